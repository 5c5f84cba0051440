"""One file of weights: placed, hashed and written by threads, whose errors come out."""

import hashlib

import numpy as np
import pytest

from trtllm.checkpoints.checkpoint import FunctionTensor, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import QuantizedScales, QuantizedValues, Source
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.targets import weights_file
from trtllm.compiler.targets.weights_file import file_nbytes, in_file_order, layout, write_weights
from trtllm.dtypes import DType
from trtllm.progress import Silent

SHAPES = {"a": (700, 512), "b": (3, 5), "c": (64, 32), "d": (1,)}


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def reader(arrays) -> RecipeReader:
    def lazy(name: str, array: np.ndarray) -> FunctionTensor:
        spec = TensorSpec(name, array.shape, DType.FLOAT32)
        return FunctionTensor(spec, lambda start, stop: array[start:stop].copy())

    return RecipeReader({name: lazy(name, array) for name, array in arrays.items()}, chunk_bytes=10_000)


@pytest.fixture
def weights() -> list[Weight]:
    return [Weight(name, Source(name, shape, DType.FLOAT32)) for name, shape in SHAPES.items()]


def test_every_weight_lies_at_its_offset_with_its_hash(tmp_path, arrays, reader, weights):
    path = tmp_path / "weights"
    entries, digest = write_weights(path, weights, reader, Silent())
    data = path.read_bytes()
    assert len(data) == file_nbytes(weights)
    assert hashlib.sha256(data).hexdigest() == digest
    for entry in entries:
        payload = data[entry.offset : entry.offset + entry.nbytes]
        assert payload == arrays[entry.name].tobytes()
        assert hashlib.sha256(payload).hexdigest() == entry.sha256
        assert entry.offset == layout(weights)[entry.name]


def test_large_weights_begin_at_a_page_and_small_ones_at_a_cache_line(weights):
    offsets = layout(weights)
    assert offsets["a"] % weights_file.ALIGNMENT == 0
    assert all(offset % weights_file.SMALL_ALIGNMENT == 0 for offset in offsets.values())


def test_weights_follow_the_files_and_scales_their_values():
    c = Source("c", SHAPES["c"], DType.FLOAT32)
    values = Weight("c_values", QuantizedValues(c, 8, 32, DType.FLOAT32))
    scales = Weight("c_scales", QuantizedScales(c, 8, 32, DType.FLOAT32))
    a = Weight("a", Source("a", SHAPES["a"], DType.FLOAT32))
    assert in_file_order([values, scales, a], ["a", "b", "c"]) == [a, values, scales]


@pytest.mark.parametrize("method", ["_write"])
def test_an_error_of_a_thread_is_raised(tmp_path, reader, weights, monkeypatch, method):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_file._Output, method, fail)
    with pytest.raises(OSError, match="No space left"):
        write_weights(tmp_path / "weights", weights, reader, Silent())


def test_what_waits_to_be_written_is_bounded(tmp_path, reader, weights, monkeypatch):
    put, waiting = weights_file._Output.put, []

    def watched(output, payload, digest):
        put(output, payload, digest)
        waiting.append(output._waiting_bytes)

    monkeypatch.setattr(weights_file._Output, "put", watched)
    write_weights(tmp_path / "weights", weights, reader, Silent())
    assert max(waiting) <= reader.chunk_bytes
