"""The container parser agrees with the gguf package, and no damaged file gets past it."""

import struct

import gguf
import numpy as np
import pytest

from trtllm.errors import BadInputError, TrtllmError, UnsupportedModelError
from trtllm.frontends.gguf.container import open_container
from trtllm.frontends.gguf.payloads import as_stored, check_readable


@pytest.fixture
def sample(write_gguf, tmp_path):
    def values(writer):
        writer.add_array("x.strings", ["a", "", "ünï"])
        writer.add_array("x.numbers", [1.5, -2.0])
        writer.add_array("x.flags", [True, False])
        writer.add_int64("x.long", -(2**40))
        writer.add_bool("x.flag", True)
        writer.add_float64("x.double", 0.1)

    return write_gguf(tmp_path / "m.gguf", "llama", kind=gguf.GGMLQuantizationType.Q8_0, change=values)


def test_it_agrees_with_the_package(sample):
    ours, theirs = open_container(sample), gguf.GGUFReader(sample)
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        value = field.contents()
        assert ours.metadata[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(tensor.shape.tolist()[::-1])
        assert (found.offset, found.nbytes, found.kind) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        expected = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(found.shape)
        np.testing.assert_array_equal(as_stored(found, "w").read(), expected)


def test_float32_metadata_are_their_shortest_decimal(sample):
    assert open_container(sample).metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-6


def test_a_cut_file_is_named_with_both_sizes(sample):
    size = sample.stat().st_size
    sample.write_bytes(sample.read_bytes()[: size - 200])
    with pytest.raises(BadInputError, match=rf"m\.gguf is {size - 200} bytes long, tensor '.*' ends at byte \d+"):
        open_container(sample)


def test_every_truncation_is_an_error_of_ours(sample):
    whole = sample.read_bytes()
    for size in [*range(0, 2000, 13), *range(2000, len(whole) - 64, 5003)]:
        sample.write_bytes(whole[:size])
        with pytest.raises(BadInputError, match=r"m\.gguf"):
            open_container(sample)


def test_no_flipped_byte_of_the_header_raises_anything_but_our_errors(sample):
    whole = bytearray(sample.read_bytes())
    header = min(tensor.offset for tensor in open_container(sample).tensors.values())
    random = np.random.default_rng(0)
    for position in random.integers(0, header, 600).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= int(random.integers(1, 256))
        sample.write_bytes(damaged)
        try:
            open_container(sample)
        except TrtllmError as error:
            assert "m.gguf" in error.what  # noqa: PT017


@pytest.mark.parametrize("magic", [b"GGML", b"\0\0\0\0", b"FUGG"])
def test_another_magic_is_refused(sample, magic):
    sample.write_bytes(magic + sample.read_bytes()[4:])
    with pytest.raises(BadInputError, match="begins with"):
        open_container(sample)


@pytest.mark.parametrize(("version", "words"), [(1, "version 1"), (4, "version 4"), (0x03000000, "big-endian")])
def test_another_version_is_refused(sample, version, words):
    whole = sample.read_bytes()
    sample.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
    with pytest.raises(UnsupportedModelError, match=words):
        open_container(sample)


@pytest.mark.parametrize("count", [2**63, 10**9])
def test_absurd_counts_end_at_the_end_of_the_file(sample, count):
    whole = sample.read_bytes()
    sample.write_bytes(whole[:16] + struct.pack("<Q", count) + whole[24:])
    with pytest.raises(BadInputError, match=r"m\.gguf"):
        open_container(sample)


def _file(path, *, values=b"", value_count=0, infos=b"", info_count=0):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, info_count, value_count) + values + infos + b"\0" * 64)
    return path


def _text(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def _info(name="w", shape=(4,), kind=0, offset=0):
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("values", "count", "words"),
    [
        (_text("a") + struct.pack("<IB", 0, 1) + _text("a") + struct.pack("<IB", 0, 1), 2, "'a' twice"),
        (_text("a") + struct.pack("<I", 99), 1, "type 99"),
        (_text(b"\xff\xfe"), 1, "not UTF-8"),
        (_text("a") + struct.pack("<IIQ", 9, 0, 2**60), 1, "needs at least"),
        (_text("a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 20, 1, "nested"),
        (_text("general.alignment") + struct.pack("<II", 4, 0), 1, "general.alignment"),
        (struct.pack("<Q", 2**62), 1, "needs at least"),
    ],
)
def test_damaged_metadata_are_refused(tmp_path, values, count, words):
    with pytest.raises(BadInputError, match=words):
        open_container(_file(tmp_path / "m.gguf", values=values, value_count=count))


@pytest.mark.parametrize(
    ("infos", "count", "words"),
    [
        (_info() + _info(), 2, "'w' twice"),
        (_info(shape=(4, 1, 1, 1, 1)), 1, "'w' 5 axes"),
        (_info(shape=()), 1, "'w' 0 axes"),
        (_info(offset=7), 1, "'w' at offset 7"),
        (_info(shape=(33,), kind=8), 1, "'w' with rows of 33"),
        (_info(shape=(2**40,)), 1, "'w' ends at byte"),
        (_info(shape=(2**63, 2**63)), 1, "'w' ends at byte"),
    ],
)
def test_damaged_tensor_entries_are_refused_by_name(tmp_path, infos, count, words):
    with pytest.raises(BadInputError, match=words):
        open_container(_file(tmp_path / "m.gguf", infos=infos, info_count=count))


def test_an_unknown_ggml_type_names_the_tensor(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"'w'.*type 199"):
        open_container(_file(tmp_path / "m.gguf", infos=_info(kind=199), info_count=1))


def test_a_type_without_dequantization_names_the_tensor(tmp_path):
    infos = _info(shape=(256,), kind=int(gguf.GGMLQuantizationType.Q8_K))
    path = _file(tmp_path / "m.gguf", infos=infos, info_count=1)
    path.write_bytes(path.read_bytes() + b"\0" * 400)
    with pytest.raises(UnsupportedModelError, match=r"'w'.*Q8_K"):
        check_readable(open_container(path).tensors["w"])
