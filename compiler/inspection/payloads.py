"""The weights of an engine as tensors that can be read by rows; quantized matrices are read as what they stand for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cache
from math import prod

import numpy as np

from trtllm.checkpoints.checkpoint import FunctionTensor, LazyTensor, TensorSpec
from trtllm.checkpoints.quantize import QuantizedBlocks, dequantize_blocks, tile
from trtllm.checkpoints.recipes import (
    TILE_BLOCK,
    TILE_ROWS,
    AsymmetricValues,
    Concat,
    KeptValues,
    QuantizedValues,
    Recipe,
    Reshape,
    Slice,
    Stored,
    TiledScales,
    TiledValues,
    Transpose,
    UnsignedBlocks,
)
from trtllm.checkpoints.stored import Offset
from trtllm.compiler.engine import Engine, WeightEntry
from trtllm.compiler.inspection.small_formats import expert_matrices, scaled_matrix
from trtllm.compiler.stripping import is_stripped, kept_offsets
from trtllm.dtypes import DType
from trtllm.errors import BadInputError

VALUES, SCALES, OFFSETS = "_values", "_scales", "_offsets"


def engine_tensors(engine: Engine) -> dict[str, LazyTensor]:
    """Every weight that the engine holds, by name, as stored; stripped ones are missing."""
    offsets = kept_offsets(engine.manifest) if is_stripped(engine.manifest) else None
    found: dict[str, LazyTensor] = {}
    for entry in engine.manifest.weights:
        if (offsets is None or entry.name in offsets) and (engine.path / entry.file).is_file() and entry.nbytes:
            found[entry.name] = _mapped(engine, entry, entry.offset if offsets is None else offsets[entry.name])
    return found


def _mapped(engine: Engine, entry: WeightEntry, offset: int) -> LazyTensor:
    dtype = DType.of(entry.dtype)
    spec = TensorSpec(entry.name, entry.shape, dtype)
    row_bytes = entry.nbytes // max(1, entry.shape[0] if entry.shape else 1)
    packed = dtype is DType.INT4
    shape = (*entry.shape[1:-1], entry.shape[-1] // 2) if packed else entry.shape[1:]

    def rows(start: int, stop: int) -> np.ndarray:
        with (engine.path / entry.file).open("rb") as file:
            file.seek(offset + start * row_bytes)
            data = file.read((stop - start) * row_bytes)
        if len(data) != (stop - start) * row_bytes:
            raise BadInputError(f"{engine.path / entry.file} ends within '{entry.name}'", "copy the engine again")
        values = np.frombuffer(data, dtype.numpy)
        return values.reshape((stop - start, *shape) if entry.shape else ())

    return FunctionTensor(spec, rows)


def matrices(tensors: Mapping[str, LazyTensor], recipes: Mapping[str, Recipe]) -> dict[str, LazyTensor]:
    """The weights that are values of a quantization with scales, as float32 [N, K], by the values' name.

    Those in the layouts of the `trtllm.cpu` kernels and of MatMulNBits, small formats in rows, and experts of QMoE
    [E, N, K]; others are not among them.
    """
    found: dict[str, LazyTensor] = {}
    for name, recipe in recipes.items():
        scales = tensors.get(name.replace(VALUES, SCALES))
        if name not in tensors or VALUES not in name:
            continue
        if isinstance(recipe, UnsignedBlocks):
            scales = tensors.get(name.replace(VALUES, SCALES).removesuffix("_blocks") + "_flat")
            made = _from_blocks(recipe, tensors[name], scales)
        elif isinstance(recipe, TiledValues) and isinstance(recipes.get(name.replace(VALUES, SCALES)), TiledScales):
            made = _from_tiles(recipe, tensors[name], scales, tensors.get(name.replace(VALUES, OFFSETS)))
        else:
            made = scaled_matrix(name, tensors, recipes) or expert_matrices(name, tensors, recipe)
        if made is not None:
            found[name] = made
    return found


def _from_tiles(
    recipe: TiledValues, values: LazyTensor, scales: LazyTensor | None, offsets: LazyTensor | None
) -> LazyTensor | None:
    offset = offset_of(recipe.of)
    if scales is None or offset is None or (offsets is None) is not (offset is Offset.NONE):
        return None
    held, beside, bits = scales, offsets, recipe.of.dtype.bits

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start // TILE_ROWS, -(-stop // TILE_ROWS)
        integers = untiled_values(values.read(first, last), bits).astype(np.float32)
        dense = integers.reshape(len(integers), -1, TILE_BLOCK)
        factors = untiled_scales(held.read(first, last)).astype(np.float32)[..., None]
        if beside is not None:
            addends = untiled_scales(beside.read(first, last)).astype(np.float32)[..., None]
            dense += 8 if bits == 4 else 0  # with an offset the integers of 4 bits count from 0
            dense = dense * factors + addends if offset is Offset.MINIMUM else (dense - addends) * factors
        else:
            dense = dense * factors
        return dense.reshape(len(integers), -1)[start - first * TILE_ROWS : stop - first * TILE_ROWS]

    return FunctionTensor(TensorSpec(values.spec.name, recipe.of.shape, DType.FLOAT32), rows)


def offset_of(recipe: Recipe) -> Offset | None:
    """What belongs to the integers of a values recipe beside their scales; None when it does not tell."""
    if isinstance(recipe, KeptValues):
        return Offset(recipe.offset)
    if isinstance(recipe, AsymmetricValues):
        return Offset.MINIMUM
    if isinstance(recipe, Stored):
        return Offset.MINIMUM if recipe.name.endswith(".counted_values") else Offset.NONE
    if isinstance(recipe, QuantizedValues):
        return Offset.NONE
    if isinstance(recipe, Concat | Slice | Reshape | Transpose):
        found = {offset_of(operand) for operand in recipe.operands}
        return found.pop() if len(found) == 1 else None
    return None


def _from_blocks(recipe: UnsignedBlocks, values: LazyTensor, scales: LazyTensor | None) -> LazyTensor | None:
    if scales is None or len(recipe.of.shape) != 2:
        return None
    held, bits = scales, recipe.of.dtype.bits
    per_row = recipe.of.shape[1] // recipe.block_size
    zero = np.uint8(0x88 if bits == 4 else 0x80)

    def rows(start: int, stop: int) -> np.ndarray:
        integers = (values.read(start, stop).reshape(stop - start, -1) ^ zero).view(np.uint8 if bits == 4 else np.int8)
        factors = held.read(start * per_row, stop * per_row).reshape(stop - start, per_row)
        return dequantize_blocks(QuantizedBlocks(integers, factors), bits)

    return FunctionTensor(TensorSpec(values.spec.name, recipe.of.shape, DType.FLOAT32), rows)


def untiled_values(tiles: np.ndarray, bits: int) -> np.ndarray:
    """int8 [tiles * 16, K] of values in the kernel's tiles uint8 [tiles, blocks, 64 * bits]."""
    count, blocks = tiles.shape[:2]
    cells = tiles if bits == 8 else np.stack([tiles & 15, tiles >> 4], axis=-1).reshape(count, blocks, -1)
    ordered = cells[..., _cells(bits)].reshape(count, blocks, TILE_ROWS, TILE_BLOCK).transpose(0, 2, 1, 3)
    signed = ordered.astype(np.int16) - (1 << (bits - 1))
    return signed.astype(np.int8).reshape(count * TILE_ROWS, blocks * TILE_BLOCK)


def untiled_scales(tiles: np.ndarray) -> np.ndarray:
    """float16 [tiles * 16, blocks] of scales in tiles [tiles, blocks, 16]."""
    return np.ascontiguousarray(tiles.transpose(0, 2, 1)).reshape(-1, tiles.shape[1])


@cache
def _cells(bits: int) -> np.ndarray:
    """Which cell of a tile holds element (row, column): found by tiling the elements' own numbers, digit by digit."""
    size = TILE_ROWS * TILE_BLOCK
    numbers, places, base = np.arange(size), np.zeros(size, np.int64), 1 << bits
    weight = 1
    while weight < size:
        digits = ((numbers // weight) % base).astype(np.uint8) ^ np.uint8(1 << (bits - 1))
        rows: np.ndarray = digits.reshape(TILE_ROWS, TILE_BLOCK)
        if bits == 4:
            rows = rows[:, ::2] | rows[:, 1::2] << 4
        made = tile(np.ascontiguousarray(rows), bits, 1).reshape(-1)
        cells = made if bits == 8 else np.stack([made & 15, made >> 4], axis=-1).reshape(-1)
        places += cells.astype(np.int64) * weight
        weight *= base
    return np.argsort(places)


def row_chunks(tensor: LazyTensor, chunk_bytes: int = 8 << 20) -> Iterator[tuple[int, int]]:
    """Row ranges of about `chunk_bytes` in float32; whole tiles of matrices."""
    shape = tensor.spec.shape
    rows = shape[0] if shape else 1
    step = max(TILE_ROWS if len(shape) < 3 else 1, chunk_bytes // max(1, 4 * prod(shape[1:])))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def payload_hash(tensor: LazyTensor) -> str:
    """sha256 in hex of what a tensor reads as, a few rows at a time."""
    digest = hashlib.sha256()
    for start, stop in row_chunks(tensor):
        digest.update(np.ascontiguousarray(tensor.read(start, stop)).tobytes())
    return digest.hexdigest()


def floats(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    """Rows as float64, whatever they are stored as."""
    values: np.ndarray = tensor.read(start, stop)
    if tensor.spec.dtype is DType.INT4:
        low, high = (values << 4).view(np.int8) >> 4, values.view(np.int8) >> 4
        values = np.stack([low, high], axis=-1)
    return values.astype(np.float64).reshape(-1)
