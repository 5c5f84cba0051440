"""How many bytes of arrays the evaluation of a recipe takes at most: arithmetic alone, nothing is read."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from trtllm.checkpoints.evaluation import chunk_rows, is_row_separable, stack_parts
from trtllm.checkpoints.recipes import (
    Affine,
    AsymmetricMinima,
    AsymmetricScales,
    AsymmetricValues,
    Cast,
    Concat,
    Dequantized,
    KeptOffsets,
    KeptScales,
    KeptValues,
    QuantizedScales,
    QuantizedValues,
    Recipe,
    Reshape,
    Source,
    TiledScales,
    TiledValues,
    Transpose,
    UnsignedBlocks,
)


@dataclass(frozen=True)
class ChunkMemory:
    """Bytes while one chunk of a payload is made."""

    peak: int
    """Everything that lives at once, the chunk included."""
    result: int
    """The chunk itself."""
    is_one_of_many: bool = False
    """Whether the payload has more chunks than this."""


def chunk_memory(recipe: Recipe, chunk_bytes: int) -> ChunkMemory:
    """The most that `RecipeReader.chunks` takes for a chunk, with the scales that a quantization keeps for later."""
    parts = stack_parts(recipe)
    if parts is not None:
        found = [chunk_memory(part, chunk_bytes) for part in parts]
        return ChunkMemory(max(item.peak for item in found), max(item.result for item in found), len(found) > 1)
    if isinstance(recipe, Reshape):
        return chunk_memory(recipe.of, chunk_bytes)
    rows = recipe.shape[0] if recipe.shape else 1
    step = chunk_rows(recipe, chunk_bytes)
    chunk = _memory(recipe, step, chunk_bytes)
    return ChunkMemory(chunk.peak + _kept_scales(recipe), chunk.result, step < rows)


def _memory(recipe: Recipe, rows: int, chunk_bytes: int) -> ChunkMemory:
    """For `rows` rows of the recipe's result."""
    result = _row_bytes(recipe, rows)
    if isinstance(recipe, Source):
        return ChunkMemory(result, result)
    if isinstance(recipe, Transpose | Reshape) and not is_row_separable(recipe):
        return _whole_memory(recipe, chunk_bytes)
    operands = [_memory(operand, _operand_rows(recipe, operand, rows), chunk_bytes) for operand in recipe.operands]
    before = max((operand.peak for operand in operands), default=0)
    held = sum(operand.result for operand in operands)
    return ChunkMemory(max(before, held + _made(recipe, rows, result)), result)


def _whole_memory(recipe: Transpose | Reshape, chunk_bytes: int) -> ChunkMemory:
    """A transposed matrix is filled from chunks of its operand; other steps hold operand and result."""
    if isinstance(recipe, Transpose) and is_row_separable(recipe.of):
        part = _memory(recipe.of, chunk_rows(recipe.of, chunk_bytes), chunk_bytes)
        return ChunkMemory(recipe.nbytes + part.peak, recipe.nbytes)
    operand = _memory(recipe.of, recipe.of.shape[0] if recipe.of.shape else 1, chunk_bytes)
    made = recipe.nbytes if isinstance(recipe, Transpose) else 0
    return ChunkMemory(max(operand.peak, operand.result + made), recipe.nbytes)


def _made(recipe: Recipe, rows: int, result: int) -> int:
    """Bytes of what a step allocates beside its operands."""
    match recipe:
        case QuantizedValues() | QuantizedScales():
            blocks = _elements(recipe.of, rows) // recipe.block_size
            return _elements(recipe.of, rows) * recipe.bits // 8 + recipe.scale_dtype.byte_size(blocks)
        case AsymmetricValues() | AsymmetricScales() | AsymmetricMinima():
            elements = _elements(recipe.of, rows)
            return elements // 2 + 4 * (elements // recipe.block_size)
        case KeptValues() | KeptScales() | KeptOffsets():
            return 2 * _elements(recipe.of, rows) + result
        case Dequantized():
            return 3 * 4 * _elements(recipe, rows) + result
        case Affine():
            return 2 * 4 * _elements(recipe, rows) + result
        case Cast() | Concat() | UnsignedBlocks() | TiledValues() | TiledScales():
            return result
        case _:
            return 0


def _operand_rows(recipe: Recipe, operand: Recipe, rows: int) -> int:
    if not operand.shape or not recipe.shape:
        return rows
    if isinstance(recipe, Concat) and recipe.axis == 0:
        return -(-rows * operand.shape[0] // max(recipe.shape[0], 1))
    return min(-(-rows * operand.shape[0] // max(recipe.shape[0], 1)), operand.shape[0])


def _elements(recipe: Recipe, rows: int) -> int:
    return rows * prod(recipe.shape[1:])


def _row_bytes(recipe: Recipe, rows: int) -> int:
    return recipe.dtype.byte_size(_elements(recipe, rows))


def _kept_scales(recipe: Recipe) -> int:
    """Twice the scales (and minima) of a quantization: as pieces, and joined when they are asked for."""
    if isinstance(recipe, QuantizedValues | QuantizedScales):
        blocks = prod(recipe.of.shape) // recipe.block_size
        return 2 * recipe.scale_dtype.byte_size(blocks)
    if isinstance(recipe, AsymmetricValues | AsymmetricScales | AsymmetricMinima):
        return 2 * 4 * (prod(recipe.of.shape) // recipe.block_size)
    return sum(map(_kept_scales, recipe.operands))
