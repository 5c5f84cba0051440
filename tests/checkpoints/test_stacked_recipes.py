"""Stacks of experts are evaluated part by part, whatever steps lie on the stack."""

import numpy as np
import pytest

from trtllm.checkpoints.checkpoint import FunctionTensor, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import (
    Cast,
    Concat,
    QuantizedScales,
    QuantizedValues,
    Recipe,
    Reshape,
    Source,
    Stack,
    UnsignedBlocks,
)
from trtllm.dtypes import DType

EXPERTS, ROWS, WIDTH = 3, 6, 32


class CountingCheckpoint:
    """Tensors that remember the most rows that one read asked for."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.arrays = {
            f"{kind}.{expert}": generator.normal(size=(ROWS, WIDTH)).astype(np.float32)
            for expert in range(EXPERTS)
            for kind in ("gate", "up")
        }
        self.largest_read = 0
        self.reads = 0

    @property
    def tensors(self) -> dict[str, FunctionTensor]:
        return {name: FunctionTensor(self.spec(name), self._reader(name)) for name in self.arrays}

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(name, self.arrays[name].shape, DType.FLOAT32)

    def _reader(self, name):
        def read(start: int, stop: int) -> np.ndarray:
            self.largest_read = max(self.largest_read, stop - start)
            self.reads += 1
            return self.arrays[name][start:stop].copy()

        return read

    def interleaved(self) -> Stack:
        """[E, 2F, H] with gate and up rows in turn."""
        return Stack(tuple(self._expert(expert) for expert in range(EXPERTS)))

    def _expert(self, expert: int) -> Recipe:
        sources = [Source.of(self.spec(f"{kind}.{expert}")) for kind in ("gate", "up")]
        pairs = Concat(tuple(Reshape(source, (ROWS, 1, WIDTH)) for source in sources), axis=1)
        return Reshape(pairs, (2 * ROWS, WIDTH))


def expected(checkpoint: CountingCheckpoint) -> np.ndarray:
    result = np.empty((EXPERTS, 2 * ROWS, WIDTH), np.float32)
    for expert in range(EXPERTS):
        result[expert, 0::2] = checkpoint.arrays[f"gate.{expert}"]
        result[expert, 1::2] = checkpoint.arrays[f"up.{expert}"]
    return result


def payload(reader: RecipeReader, recipe: Recipe) -> bytes:
    return b"".join(chunk.tobytes() for chunk in reader.chunks(recipe))


def test_interleaved_rows_are_read_in_chunks_and_whole_alike() -> None:
    checkpoint = CountingCheckpoint()
    small = RecipeReader(checkpoint.tensors, chunk_bytes=5 * WIDTH * 4)
    recipe = checkpoint.interleaved()
    assert payload(small, recipe) == expected(checkpoint).tobytes()
    assert checkpoint.largest_read <= 3
    np.testing.assert_array_equal(small.read(recipe), expected(checkpoint))


def test_a_cast_of_a_stack_never_holds_more_than_a_chunk_of_one_expert() -> None:
    checkpoint = CountingCheckpoint()
    reader = RecipeReader(checkpoint.tensors, chunk_bytes=1)
    recipe = Cast(checkpoint.interleaved(), DType.FLOAT16)
    assert payload(reader, recipe) == expected(checkpoint).astype(np.float16).tobytes()
    assert checkpoint.largest_read == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_experts_and_their_scales_read_the_source_once(bits: int) -> None:
    checkpoint = CountingCheckpoint()
    reader = RecipeReader(checkpoint.tensors, chunk_bytes=4 * WIDTH * 4)
    stack = checkpoint.interleaved()
    values = QuantizedValues(stack, bits, 16, DType.FLOAT32)
    scales = QuantizedScales(stack, bits, 16, DType.FLOAT32)
    blocks = Reshape(UnsignedBlocks(values, 16), (EXPERTS, 2 * ROWS, WIDTH * bits // 8))
    whole = RecipeReader(checkpoint.tensors)
    assert payload(reader, blocks) == whole.read(blocks).tobytes()
    reads = checkpoint.reads
    assert payload(reader, scales) == whole.read(scales).tobytes()
    assert checkpoint.reads == reads


@pytest.mark.parametrize("bits", [4, 8])
def test_unsigned_blocks_of_a_stack_are_the_values_shifted_by_their_zero_point(bits: int) -> None:
    checkpoint = CountingCheckpoint()
    reader = RecipeReader(checkpoint.tensors)
    stack = checkpoint.interleaved()
    stored = reader.read(UnsignedBlocks(QuantizedValues(stack, bits, 16, DType.FLOAT32), 16))
    scales = reader.read(QuantizedScales(stack, bits, 16, DType.FLOAT32))
    assert stored.shape == (EXPERTS, 2 * ROWS, WIDTH // 16, 16 * bits // 8)
    codes = np.stack([stored & 15, stored >> 4], axis=-1).reshape(*scales.shape, 16) if bits == 4 else stored
    restored = (codes.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    error = np.abs(restored.reshape(expected(checkpoint).shape) - expected(checkpoint))
    # Half a step of the grid; at 4 bits values beyond 7 steps on the short side are clipped by up to a whole one.
    largest = np.abs(scales).max() * (1.0 if bits == 4 else 0.5)
    assert error.max() <= largest * (1 + 1e-6)
