"""Weights in small formats with floating scales, and stacks of experts, as the float32 matrices that they stand for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trtllm.checkpoints.checkpoint import FunctionTensor, LazyTensor, TensorSpec
from trtllm.checkpoints.quantize import QuantizedBlocks, dequantize_blocks
from trtllm.checkpoints.recipes import TILE_ROWS, Cast, Recipe, Reshape, UnsignedBlocks
from trtllm.checkpoints.scaled_recipes import LaneTiles, RoundedBy
from trtllm.dtypes import DType

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
VALUES, SCALES, FACTOR = "_values", "_scales", "_factor"


def scaled_matrix(
    name: str, tensors: Mapping[str, LazyTensor], recipes: Mapping[str, Recipe]
) -> LazyTensor | None:  # fmt: skip
    """A weight of ScaledLinear as float32 [N, K], in the kernel's tiles or in rows; None when it is no such weight."""
    rounded, beside = _untiled(recipes[name]), name.replace(VALUES, SCALES)
    if not isinstance(rounded, RoundedBy) or beside not in tensors:
        return None
    scales = _Scales(recipes[beside], tensors[beside])
    held, stored = tensors[name], recipes[name]
    factor = tensors.get(f"{name.rpartition(VALUES)[0]}{FACTOR}")
    count, inputs = rounded.of.shape
    columns = np.arange(inputs) // (rounded.columns or inputs)
    kind = rounded

    def rows(start: int, stop: int) -> np.ndarray:
        values = _decoded(_byte_rows(stored, held, start, stop), kind.element)
        own = np.arange(start, stop)
        grid = scales(own if scales.tiled else own // (kind.rows or count))[:, columns]
        return values * grid * (1 if factor is None else factor.read(0, 1).reshape(()))

    return FunctionTensor(TensorSpec(name, (count, inputs), DType.FLOAT32), rows)


class _Scales:
    """Scales of chosen rows, float32 [rows, blocks]."""

    def __init__(self, recipe: Recipe, tensor: LazyTensor) -> None:
        self.tiled = isinstance(recipe, LaneTiles)
        """Whether every row of the weight has its own."""
        self._recipe, self._tensor = recipe, tensor
        self._dtype = recipe.of.dtype if isinstance(recipe, LaneTiles) else recipe.dtype

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        first, last = int(rows[0]), int(rows[-1]) + 1
        data = _byte_rows(self._recipe, self._tensor, first, last)[rows - first]
        if self._dtype is DType.UINT8:  # e8m0
            return np.ldexp(np.float32(1), data.astype(np.int32) - 127)
        return np.ascontiguousarray(data).view(self._dtype.numpy).astype(np.float32)


def _untiled(recipe: Recipe) -> Recipe:
    while isinstance(recipe, LaneTiles | Cast):
        recipe = recipe.of
    return recipe


def _byte_rows(recipe: Recipe, tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    """uint8 [stop - start, bytes of a row], out of tiles of 16 rows where the tensor lies in such."""
    if not isinstance(recipe, LaneTiles):
        found: np.ndarray = tensor.read(start, stop)
        return np.ascontiguousarray(found).view(np.uint8).reshape(stop - start, -1)
    first, last = start // TILE_ROWS, -(-stop // TILE_ROWS)
    tiles = tensor.read(first, last).reshape(last - first, -1, TILE_ROWS, recipe.group).transpose(0, 2, 1, 3)
    data = tiles.reshape((last - first) * TILE_ROWS, -1)[start - first * TILE_ROWS : stop - first * TILE_ROWS]
    return np.ascontiguousarray(data ^ np.uint8(0x80) if recipe.flips else data)


def _decoded(data: np.ndarray, element: str) -> np.ndarray:
    """float32 [rows, K] of stored elements."""
    if element == "e2m1":
        return _E2M1[np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)]
    stored = DType.INT8 if element == "int8" else DType.FLOAT8_E4M3
    return data.view(stored.numpy).astype(np.float32)


def expert_matrices(name: str, tensors: Mapping[str, LazyTensor], recipe: Recipe) -> LazyTensor | None:
    """Experts of QMoE as float32 [E, N, K], an expert a row; None when it is no such weight."""
    if not isinstance(recipe, Reshape) or not isinstance(recipe.of, UnsignedBlocks) or len(recipe.of.of.shape) != 3:
        return None
    blocks = recipe.of
    stem = name.replace(VALUES, SCALES).removesuffix("_blocks")
    scales = tensors.get(f"{stem}_interleaved") or tensors.get(stem)
    if scales is None:
        return None
    held, factors, (_, _, inputs) = tensors[name], scales, blocks.of.shape
    bits = blocks.of.dtype.bits
    zero = np.uint8(0x88 if bits == 4 else 0x80)

    def experts(start: int, stop: int) -> np.ndarray:
        integers = (held.read(start, stop).reshape(-1, inputs * bits // 8) ^ zero).view(
            np.uint8 if bits == 4 else np.int8
        )
        grid = factors.read(start, stop).reshape(len(integers), -1)
        return dequantize_blocks(QuantizedBlocks(integers, grid), bits).reshape(stop - start, -1, inputs)

    return FunctionTensor(TensorSpec(name, blocks.of.shape, DType.FLOAT32), experts)
