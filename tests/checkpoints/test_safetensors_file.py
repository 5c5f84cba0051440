"""The safetensors reader gives what the library gives, and names what is wrong with a damaged file."""

import json
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Cast, Concat, Source
from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.dtypes import DType
from trtllm.errors import BadInputError, UnsupportedModelError


def _write(path: Path, header: object, payload: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)
    return path


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def sample(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "float": torch.randn(7, 3, generator=generator),
        "half": torch.randn(5, 2, 2, generator=generator).half(),
        "brain": torch.randn(4, 6, generator=generator).bfloat16(),
        "eight": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "fifth": torch.randn(4, 4, generator=generator).to(torch.float8_e5m2),
        "long": torch.arange(6).reshape(2, 3),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path, tensors


def test_every_tensor_is_what_was_saved(sample):
    path, tensors = sample
    file = SafetensorsFile(path)
    assert file.specs.keys() == tensors.keys()
    assert file.metadata == {"format": "pt"}
    for name, expected in tensors.items():
        array = file.tensor(name).read()
        assert array.shape == tuple(expected.shape) == file.specs[name].shape
        assert array.dtype == file.specs[name].dtype.numpy
        assert array.tobytes() == expected.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def test_bfloat16_and_float8_come_in_storage_form(sample):
    file = SafetensorsFile(sample[0])
    assert file.tensor("brain").read().dtype == ml_dtypes.bfloat16
    assert file.specs["eight"].dtype is DType.FLOAT8_E4M3
    assert file.specs["fifth"].dtype is DType.FLOAT8_E5M2


@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 5), (6, None), (3, 3), (0, 100), (5, 2)])
def test_rows_are_the_rows_of_the_whole(sample, start, stop):
    path, tensors = sample
    rows = SafetensorsFile(path).tensor("float").read(start, stop)
    np.testing.assert_array_equal(rows, tensors["float"].numpy()[start:stop])


def test_a_read_is_a_fresh_writable_array(sample):
    tensor = SafetensorsFile(sample[0]).tensor("float")
    first = tensor.read()
    first[:] = 0
    assert tensor.read().any()


@pytest.fixture
def large(tmp_path):
    array = np.random.default_rng(0).standard_normal((512, 300)).astype(np.float32)
    path = tmp_path / "large.safetensors"
    save_file({"a": torch.ones(1), "w": torch.from_numpy(array)}, path)
    return path, array


@pytest.mark.parametrize(("start", "stop"), [(0, None), (7, 509), (0, 1), (5, 5)])
def test_what_is_borrowed_is_what_is_read(large, start, stop):
    path, array = large
    tensor = SafetensorsFile(path).tensor("w")
    assert np.array_equal(tensor.borrow(start, stop), array[start:stop])
    assert np.array_equal(tensor.read(start, stop), array[start:stop])


def test_an_unaligned_tensor_is_read_and_not_borrowed(tmp_path):
    array = np.arange(1 << 16, dtype=np.float32)
    header = {"b": _entry("U8", (1,), (0, 1)), "w": _entry("F32", array.shape, (1, 1 + array.nbytes))}
    path = _write(tmp_path / "odd.safetensors", header, b"x" + array.tobytes())
    file = SafetensorsFile(path)
    assert np.array_equal(file.tensor("w").borrow(), array)


def test_a_file_that_is_cut_short_later_is_not_borrowed(large):
    path, array = large
    tensor = SafetensorsFile(path).tensor("w")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(BadInputError, match="ends at byte"):
        tensor.borrow()
    assert np.array_equal(tensor.borrow(0, 256), array[:256])


def test_a_reader_keeps_copies_and_lends_chunks(large):
    path, array = large
    file = SafetensorsFile(path)
    tensor = file.tensor("w")
    reader = RecipeReader({"w": tensor})
    source = Source.of(tensor.spec)
    assert reader.read(source).flags.writeable and reader.rows(source, 0, 500).flags.writeable
    assert np.array_equal(np.concatenate(list(reader.chunks(source))), array)


def test_chunks_of_a_concatenation_end_where_its_parts_do(large):
    path, array = large
    reader = RecipeReader({"w": SafetensorsFile(path).tensor("w")}, chunk_bytes=100 * 1200)
    part = Source.of(SafetensorsFile(path).specs["w"])
    both = Cast(Concat((part, part), axis=0), DType.FLOAT16)
    chunks = list(reader.chunks(both))
    assert [len(chunk) for chunk in chunks] == [100, 100, 100, 100, 100, 12] * 2
    assert np.array_equal(np.concatenate(chunks), np.concatenate([array, array]).astype(np.float16))


def test_threads_read_the_same_file_at_once(sample):
    path, tensors = sample
    tensor, expected = SafetensorsFile(path).tensor("float"), tensors["float"].numpy()
    failures = []

    def read_many(seed):
        random = np.random.default_rng(seed)
        for _ in range(200):
            start, stop = sorted(random.integers(0, 8, 2))
            if not np.array_equal(tensor.read(int(start), int(stop)), expected[start:stop]):
                failures.append((start, stop))

    threads = [threading.Thread(target=read_many, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_read_does_not_map_the_file(sample):
    file = SafetensorsFile(sample[0])
    file.tensor("float").read()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    assert str(sample[0]) not in maps.read_text()


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_shorter_than_its_length_field_is_refused(tmp_path, content):
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=rf"short\.safetensors is {len(content)} bytes"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "payload", "message"),
    [
        ({"w": _entry()}, b"1234", "cut short"),
        ({"w": _entry()}, b"123456789", "no tensor owns"),
        ({"w": _entry(offsets=(4, 12))}, b"x" * 12, "leaves a gap"),
        ({"v": _entry(), "w": _entry(offsets=(4, 12))}, b"x" * 12, "'w'.*overlaps"),
        ({"v": _entry(), "w": _entry(offsets=(12, 20))}, b"x" * 20, "'w'.*gap"),
        ({"w": _entry(shape=(3,))}, b"x" * 8, "w float32.3.*8 bytes.*need 12"),
        ({"w": _entry(offsets=(8, 0))}, b"x" * 8, "'w'.*data_offsets"),
        ({"w": _entry(offsets=(0,))}, b"x" * 8, "'w'.*data_offsets"),
        ({"w": _entry(offsets=(0, 8.0))}, b"x" * 8, "'w'.*data_offsets"),
        ({"w": _entry(shape=(-2,))}, b"x" * 8, "'w'.*shape"),
        ({"w": _entry(shape=(True, 2))}, b"x" * 8, "'w'.*shape"),
        ({"w": {"dtype": "F32", "shape": [2]}}, b"x" * 8, "'w'.*expected dtype"),
        ({"w": 3}, b"", "'w'.*expected dtype"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
        ([1, 2], b"", "not a JSON object"),
        (b"{not json", b"", "not JSON"),
        (b'{"a": \xff}', b"", "not JSON"),
        (b"[" * 5000, b"", "not JSON"),
        (b'{"w": {}, "w": {}}', b"", "'w' occurs twice"),
    ],
)
def test_a_damaged_header_is_refused_by_file_and_tensor(tmp_path, header, payload, message):
    path = _write(tmp_path / "bad.safetensors", header, payload)
    with pytest.raises(BadInputError, match=message) as caught:
        SafetensorsFile(path)
    assert "bad.safetensors" in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize("length", [10_000, 200_000_000, 2**63])
def test_a_header_longer_than_the_file_or_the_format_is_refused(tmp_path, length):
    path = _write(tmp_path / "bad.safetensors", {}, length=length)
    with pytest.raises(BadInputError, match="header"):
        SafetensorsFile(path)


def test_a_cut_file_is_named_with_both_sizes(sample):
    path, _ = sample
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BadInputError, match=rf"is {size - 5} bytes long, its header describes {size}"):
        SafetensorsFile(path)


def test_every_truncation_of_a_file_is_an_error_of_ours(sample):
    path, _ = sample
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(BadInputError):
            SafetensorsFile(path)


def test_a_file_that_shrinks_after_opening_is_an_error_of_ours(sample):
    path, _ = sample
    tensor = SafetensorsFile(path).tensor("float")
    with path.open("r+b") as stream:
        stream.truncate(200)
    with pytest.raises(BadInputError, match=r"model\.safetensors ends at byte"):
        tensor.read()


def test_an_element_type_without_a_numpy_form_names_the_tensor(tmp_path):
    path = _write(tmp_path / "x.safetensors", {"w": _entry(dtype="F4", shape=(2,), offsets=(0, 1))}, b"x")
    with pytest.raises(UnsupportedModelError, match=r"'w'.*F4"):
        SafetensorsFile(path)


def test_a_missing_tensor_and_a_missing_file_are_named(sample, tmp_path):
    with pytest.raises(BadInputError, match="'nothing'"):
        SafetensorsFile(sample[0]).tensor("nothing")
    with pytest.raises(BadInputError, match=r"absent\.safetensors"):
        SafetensorsFile(tmp_path / "absent.safetensors")
    with pytest.raises(BadInputError, match=str(tmp_path)):
        SafetensorsFile(tmp_path)


def test_empty_tensors_may_lie_anywhere_between_others(tmp_path):
    header = {"a": _entry(), "e": _entry(shape=(0,), offsets=(8, 8)), "b": _entry(offsets=(8, 16))}
    file = SafetensorsFile(_write(tmp_path / "x.safetensors", header, b"\0" * 16))
    assert file.tensor("e").read().shape == (0,)
