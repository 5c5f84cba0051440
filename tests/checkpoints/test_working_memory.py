"""The memory that chunks are said to take, against what numpy allocates while they are made."""

import tracemalloc

import numpy as np
import pytest

from trtllm.checkpoints.checkpoint import FunctionTensor, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import (
    Affine,
    Cast,
    Concat,
    QuantizedScales,
    QuantizedValues,
    Recipe,
    Reshape,
    Slice,
    Source,
    Stack,
    Transpose,
    UnsignedBlocks,
)
from trtllm.checkpoints.working_memory import chunk_memory
from trtllm.dtypes import DType

ROWS, COLUMNS = 2048, 512
SMALL_ARRAYS = 64 << 10


def source(name: str = "w") -> Source:
    return Source(name, (ROWS, COLUMNS), DType.BFLOAT16)


def tensor(name: str) -> FunctionTensor:
    def rows(start: int, stop: int) -> np.ndarray:
        return np.full((stop - start, COLUMNS), 0x3F80, np.uint16).view(DType.BFLOAT16.numpy)

    return FunctionTensor(TensorSpec(name, (ROWS, COLUMNS), DType.BFLOAT16), rows)


WIDE = Cast(source(), DType.FLOAT32)
PACKED = Concat((source("w"), source("v")), axis=0)
VALUES = QuantizedValues(PACKED, 4, 32, DType.FLOAT16)
RECIPES: dict[str, Recipe] = {
    "source": source(),
    "cast": WIDE,
    "affine": Affine(WIDE, offset=1.0),
    "packed": PACKED,
    "transposed": Transpose(Cast(PACKED, DType.FLOAT32), (1, 0)),
    "sliced": Slice(WIDE, 1, 0, 128),
    "joined side by side": Concat((source("w"), source("v")), axis=1),
    "stacked": Stack((source("w"), source("v"))),
    "int4": UnsignedBlocks(VALUES, 32),
    "int8": QuantizedValues(source(), 8, 32, DType.FLOAT32),
    "scales": Reshape(QuantizedScales(PACKED, 4, 32, DType.FLOAT16), (2 * ROWS * COLUMNS // 32,)),
}


@pytest.mark.parametrize("chunk_bytes", [64 << 10, 512 << 10, 64 << 20])
@pytest.mark.parametrize("name", RECIPES)
def test_no_chunk_takes_more_than_was_said(name, chunk_bytes):
    recipe = RECIPES[name]
    reader = RecipeReader({"w": tensor("w"), "v": tensor("v")}, chunk_bytes=chunk_bytes, threads=1)
    said = chunk_memory(recipe, chunk_bytes)
    tracemalloc.start()
    largest, total = 0, 0
    for chunk in reader.chunks(recipe):
        largest, total = max(largest, chunk.nbytes), total + chunk.nbytes
        del chunk
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == recipe.nbytes
    assert largest <= said.result
    assert peak <= said.peak + SMALL_ARRAYS
    assert said.peak <= 5 * max(peak, SMALL_ARRAYS), "a bound far from the truth refuses builds that fit"


@pytest.mark.parametrize("chunk_bytes", [64 << 10, 64 << 20])
def test_scales_are_kept_until_they_were_read_and_no_longer(chunk_bytes):
    reader = RecipeReader({"w": tensor("w"), "v": tensor("v")}, chunk_bytes=chunk_bytes)
    for _ in reader.chunks(VALUES):
        pass
    assert reader._scales
    for _ in reader.chunks(QuantizedScales(PACKED, 4, 32, DType.FLOAT16)):
        pass
    assert not reader._scales, "a build would hold the scales of every layer"


def test_transposing_in_pieces_gives_the_transpose():
    values = np.random.default_rng(0).integers(0, 1 << 15, (ROWS, COLUMNS), dtype=np.uint16).view(DType.BFLOAT16.numpy)
    lazy = FunctionTensor(
        TensorSpec("w", (ROWS, COLUMNS), DType.BFLOAT16), lambda start, stop: values[start:stop].copy()
    )
    reader = RecipeReader({"w": lazy}, chunk_bytes=10_000)
    (chunk,) = reader.chunks(Transpose(source(), (1, 0)))
    assert np.array_equal(chunk.view(np.uint16), values.T.view(np.uint16))
