"""Runs recipes on a checkpoint: payloads are read once, late, and in row chunks of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from math import prod

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.checkpoints.pruned import is_pruned_tensor
from trtllm.checkpoints.quantize import (
    CountedBlocks,
    QuantizedBlocks,
    convert,
    quantize_blocks,
    quantize_counted,
    tile,
    transpose_into,
)
from trtllm.checkpoints.recipes import (
    TILE_BLOCK,
    TILE_ROWS,
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
    Slice,
    Source,
    Stack,
    TiledScales,
    TiledValues,
    Transpose,
    UnsignedBlocks,
    Zeros,
)
from trtllm.checkpoints.scaled_recipes import STEPS as SCALED_STEPS
from trtllm.checkpoints.scaled_recipes import ScaledRows
from trtllm.checkpoints.stored import QuantizedTensor
from trtllm.checkpoints.stored_reading import integer_rows, offset_rows, scale_rows
from trtllm.dtypes import DType
from trtllm.errors import BadInputError

DEFAULT_CHUNK_BYTES = 8 << 20
"""Source bytes that one chunk may read. What is made of it stays below 32 MiB, where the allocator gives the same pages
again instead of fresh ones, which the system would have to clear."""
_BAND = 64
"""Rows that are transposed at once: their lines stay in the processor's cache."""
_CONVERTED = (DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16)
"""The types among which C++ converts, bit for bit as numpy does."""
_WORTH_THREADS = 4096
"""Elements below which numpy is as fast."""


class RecipeReader:
    """Evaluates recipes over the tensors of one checkpoint.

    The scales of a quantization are kept when its values are computed, so that asking for values and then scales
    reads the source once. Not thread safe.
    """

    def __init__(
        self, tensors: Mapping[str, LazyTensor], *, chunk_bytes: int = DEFAULT_CHUNK_BYTES, threads: int = 0
    ) -> None:
        """`threads` quantize and convert, 0 means all cores."""
        self._tensors = tensors
        self.chunk_bytes = chunk_bytes
        self._threads = threads
        self._scales: dict[Recipe, dict[int, np.ndarray]] = {}
        self._scaled = ScaledRows(self._rows)

    @property
    def source_names(self) -> Iterable[str]:
        """The checkpoint's tensors in the order of its files."""
        return self._tensors.keys()

    def read(self, recipe: Recipe) -> np.ndarray:
        """The whole result in storage form, shape `recipe.shape` (int4: last axis halved)."""
        return _kept(self._rows(recipe, 0, _extent(recipe)))

    def lacks(self, recipe: Recipe) -> bool:
        """Whether a tensor that it is made of was pruned from the checkpoint."""
        return any(is_pruned_tensor(self._tensors[name]) for name in recipe.sources() if name in self._tensors)

    def rows(self, recipe: Recipe, start: int, stop: int) -> np.ndarray:
        """Rows `start:stop` of the result; only what they are made of is read where that is possible."""
        return _kept(self._rows(recipe, start, stop))

    def chunks(self, recipe: Recipe) -> Iterator[np.ndarray]:
        """The result in row-major pieces; their concatenated bytes are the payload. A stack goes part by part.

        A piece may be a read-only view of the checkpoint's file: let go of it before the next but few is taken.
        """
        parts = stack_parts(recipe)
        if parts is not None:
            for part in parts:
                yield from self.chunks(part)
            return
        if isinstance(recipe, Reshape):  # the same bytes in the same order
            yield from self.chunks(recipe.of)
            return
        step = chunk_rows(recipe, self.chunk_bytes)
        for first, last in pairwise((0, *_seams(recipe), _extent(recipe))):
            for start in range(first, last, step):
                yield np.ascontiguousarray(self._rows(recipe, start, min(start + step, last)))

    def _rows(self, recipe: Recipe, start: int, stop: int) -> np.ndarray:
        match recipe:
            case Source():
                return self._source_rows(recipe, start, stop)
            case Cast():
                return cast_array(self._rows(recipe.of, start, stop), recipe.of.dtype, recipe.to, self._threads)
            case Affine():
                values = self._rows(recipe.of, start, stop)
                return (values.astype(np.float32) * np.float32(recipe.scale) + np.float32(recipe.offset)).astype(
                    values.dtype
                )
            case QuantizedValues() | AsymmetricValues():
                return self._quantized_rows(recipe, start, stop)
            case QuantizedScales() | AsymmetricScales() | AsymmetricMinima():
                return self._scale_rows(recipe, start, stop)
            case Dequantized():
                return self._dequantized_rows(recipe, start, stop)
            case TiledValues() | TiledScales():
                return self._tiled_rows(recipe, start, stop)
            case KeptValues() | KeptScales() | KeptOffsets():
                return self._stored_rows(recipe, start, stop)
            case Zeros():
                return np.zeros((stop - start, *recipe.shape[1:]), recipe.dtype.numpy)
            case UnsignedBlocks():
                return self._unsigned_rows(recipe, start, stop)
            case _ if recipe.step in SCALED_STEPS:
                return self._scaled(recipe, start, stop)
            case Stack():
                return np.stack([self._rows(part, 0, _extent(part)) for part in recipe.parts[start:stop]])
            case Concat(axis=0):
                return self._concatenated_rows(recipe, start, stop)
            case Slice(axis=0):
                return self._rows(recipe.of, recipe.start + start, recipe.start + stop)
            case _ if _passes_rows(recipe):
                return self._row_wise(recipe, start, stop)
            case Reshape() if _rows_split(recipe):
                return self._split_rows(recipe, start, stop)
            case _:
                return self._whole(recipe)[start:stop]

    def _source_rows(self, recipe: Source, start: int, stop: int) -> np.ndarray:
        tensor = self._tensors.get(recipe.name)
        if tensor is None:
            raise BadInputError(f"the checkpoint has no tensor '{recipe.name}'", "it is of another model or incomplete")
        if tensor.spec.shape != recipe.source_shape:
            raise BadInputError(
                f"tensor '{recipe.name}' is {_times(tensor.spec.shape)}, expected {_times(recipe.source_shape)}",
                "the checkpoint is of another model",
            )
        values = getattr(tensor, "borrow", tensor.read)(start, stop)
        return cast_array(values, tensor.spec.dtype, recipe.source_dtype, self._threads)

    def _row_wise(self, recipe: Recipe, start: int, stop: int) -> np.ndarray:
        """Steps that keep the first axis: rows of the result are made from the same rows of the operands."""
        if isinstance(recipe, Concat):
            return np.concatenate([self._rows(part, start, stop) for part in recipe.parts], axis=recipe.axis)
        assert isinstance(recipe, Reshape | Transpose | Slice)
        values = self._rows(recipe.of, start, stop)
        if isinstance(recipe, Reshape):
            return values.reshape(stop - start, *_storage_shape(recipe)[1:])
        if isinstance(recipe, Transpose):
            return values.transpose(recipe.permutation)
        selection = [slice(None)] * values.ndim
        selection[recipe.axis] = slice(recipe.start, recipe.stop)
        return values[tuple(selection)]

    def _split_rows(self, recipe: Reshape, start: int, stop: int) -> np.ndarray:
        """A reshape that makes several rows of each row: only the rows that hold `start:stop` are made."""
        ratio = _rows_split(recipe)
        first = start // ratio
        values = self._rows(recipe.of, first, -(-stop // ratio))
        values = values.reshape(-1, *_storage_shape(recipe)[1:])
        return values[start - first * ratio : stop - first * ratio]

    def _whole(self, recipe: Recipe) -> np.ndarray:
        assert isinstance(recipe, Reshape | Transpose)
        if isinstance(recipe, Transpose) and recipe.permutation == (1, 0) and is_row_separable(recipe.of):
            return self._turned(recipe)
        values = self._rows(recipe.of, 0, _extent(recipe.of))
        if isinstance(recipe, Reshape):
            return values.reshape(_storage_shape(recipe))
        return np.ascontiguousarray(values.transpose(recipe.permutation))

    def _turned(self, recipe: Transpose) -> np.ndarray:
        """A transposed matrix, filled chunk by chunk, so that its operand is never held whole."""
        result = np.empty(recipe.shape, recipe.dtype.numpy)
        rows, step = _extent(recipe.of), chunk_rows(recipe.of, self.chunk_bytes)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            _transpose_into(result, start, self._rows(recipe.of, start, stop))
        return result

    def _concatenated_rows(self, recipe: Concat, start: int, stop: int) -> np.ndarray:
        pieces, offset = [], 0
        for part in recipe.parts:
            rows = part.shape[0]
            low, high = max(start - offset, 0), min(stop - offset, rows)
            if low < high:
                pieces.append(self._rows(part, low, high))
            offset += rows
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=0)

    def _quantized_rows(
        self, recipe: QuantizedValues | AsymmetricValues, start: int, stop: int, *, tiled: bool = False
    ) -> np.ndarray:
        blocks = self._quantize(recipe, start, stop, tiled=tiled)
        for key, found in zip(_beside(recipe), blocks[1:], strict=True):
            self._scales.setdefault(key, {})[start] = found
        return blocks.values

    def _scale_rows(
        self, recipe: QuantizedScales | AsymmetricScales | AsymmetricMinima, start: int, stop: int
    ) -> np.ndarray:
        kept = self._scales.pop(recipe, {})
        ordered = [kept[row] for row in sorted(kept)]
        if sum(len(piece) for piece in ordered) == recipe.shape[0]:
            whole = np.concatenate(ordered) if len(ordered) > 1 else ordered[0]
            if stop < len(whole):  # the last rows are asked for last: then nothing is kept
                self._scales[recipe] = {0: whole}
            return whole[start:stop]
        blocks = self._quantize(recipe, start, stop)
        if isinstance(recipe, AsymmetricMinima):
            assert isinstance(blocks, CountedBlocks)
            return blocks.minima
        return blocks.scales

    def _quantize(
        self, recipe: Recipe, start: int, stop: int, *, tiled: bool = False
    ) -> QuantizedBlocks | CountedBlocks:
        """A quantization's rows, whichever of its parts is asked for; `tiled` goes with matrices in blocks of 32."""
        assert isinstance(
            recipe, QuantizedValues | QuantizedScales | AsymmetricValues | AsymmetricScales | AsymmetricMinima
        )
        weights = self._rows(recipe.of, start, stop)
        lead, k = weights.shape[:-1], weights.shape[-1]
        flat = np.ascontiguousarray(weights).reshape(-1, k)
        blocks: QuantizedBlocks | CountedBlocks
        try:
            if isinstance(recipe, QuantizedValues | QuantizedScales):
                blocks = quantize_blocks(
                    flat, recipe.bits, recipe.block_size, recipe.scale_dtype.value, search=recipe.search,
                    tiled=tiled, threads=self._threads,
                )  # fmt: skip
            else:
                blocks = quantize_counted(flat, recipe.block_size, search=recipe.search, threads=self._threads)
        except ValueError as error:
            hint = "keep it unquantized" if "too large" in str(error) else "the checkpoint is damaged; fetch it again"
            raise BadInputError(f"cannot quantize {', '.join(recipe.sources())}: {error}", hint) from None
        return blocks if len(lead) == 1 else type(blocks)(*(part.reshape(*lead, -1) for part in blocks))

    def _dequantized_rows(self, recipe: Dequantized, start: int, stop: int) -> np.ndarray:
        assert isinstance(recipe.of, QuantizedValues)
        blocks = self._quantize(recipe.of, start, stop)
        values = blocks.values
        if recipe.of.bits == 4:  # two in a byte, the first in its low half
            pairs = values.view(np.uint8)
            values = np.stack([pairs << 4, pairs & 0xF0], axis=-1).view(np.int8) >> 4
        scales = blocks.scales.astype(np.float32)
        shape = (*scales.shape, recipe.of.block_size)
        wide = values.reshape(shape).astype(np.float32)
        wide *= scales[..., None]
        return cast_array(wide.reshape(stop - start, *recipe.shape[1:]), DType.FLOAT32, recipe.to, self._threads)

    def _stored_rows(self, recipe: KeptValues | KeptScales | KeptOffsets, start: int, stop: int) -> np.ndarray:
        """What the checkpoint's own quantization has, for a source that is quantized there."""
        assert isinstance(recipe.of, Source)
        tensor = self._tensors.get(recipe.of.name)
        if isinstance(tensor, QuantizedTensor) and tensor.spec.shape == recipe.of.shape and tensor.blocks is not None:
            if isinstance(recipe, KeptValues):
                return integer_rows(tensor, recipe, start, stop)
            return (scale_rows if isinstance(recipe, KeptScales) else offset_rows)(tensor, recipe, start, stop)
        self._source_rows(recipe.of, 0, 0)  # names a tensor that is missing or of another shape
        raise BadInputError(
            f"tensor '{recipe.of.name}' is not stored as integers with scales, which this engine keeps",
            "the checkpoint is of another quantization; build the engine anew",
        )

    def _unsigned_rows(self, recipe: UnsignedBlocks, start: int, stop: int) -> np.ndarray:
        values = self._rows(recipe.of, start, stop).view(np.uint8)
        zero_point = np.uint8(0x88 if recipe.of.dtype is DType.INT4 else 0x80)
        return (values ^ zero_point).reshape(stop - start, *recipe.shape[1:])

    def _tiled_rows(self, recipe: TiledValues | TiledScales, start: int, stop: int) -> np.ndarray:
        first, last = start * TILE_ROWS, min(stop * TILE_ROWS, recipe.of.shape[0])
        of = recipe.of
        if isinstance(of, QuantizedValues) and of.block_size == TILE_BLOCK:
            return self._quantized_rows(of, first, last, tiled=True)
        rows = self._rows(of, first, last)
        bits = 16 if isinstance(recipe, TiledScales) else recipe.of.dtype.bits
        return tile(rows, bits, recipe.shape[1], threads=self._threads)


def _beside(recipe: QuantizedValues | AsymmetricValues) -> tuple[Recipe, ...]:
    """The recipes of what belongs to these integers, in the order of the blocks' parts."""
    if isinstance(recipe, QuantizedValues):
        return (QuantizedScales(recipe.of, recipe.bits, recipe.block_size, recipe.scale_dtype, recipe.search),)
    details = (recipe.of, recipe.block_size, recipe.search)
    return AsymmetricScales(*details), AsymmetricMinima(*details)


def stack_parts(recipe: Recipe) -> tuple[Recipe, ...] | None:
    """The parts whose payloads in order are the payload of `recipe`, with steps on a stack moved to its parts.

    Cast(Stack([a, b]))     becomes     Cast(a), Cast(b)

    None when the recipe is no stack.
    """
    match recipe:
        case Stack():
            return recipe.parts
        case Cast() | Affine() | QuantizedValues() | QuantizedScales() | Dequantized() | UnsignedBlocks():
            parts = stack_parts(recipe.of)
            return parts and tuple(replace(recipe, of=part) for part in parts)
        case Reshape() if len(recipe.to) > 1 and recipe.to[0] == _extent(recipe.of):
            parts = stack_parts(recipe.of)
            return parts and tuple(Reshape(part, recipe.to[1:]) for part in parts)
        case _:
            return None


def chunk_rows(recipe: Recipe, chunk_bytes: int) -> int:
    """Rows of the first axis that a chunk holds: all when they cannot be made one by one."""
    rows = max(_extent(recipe), 1)
    if not is_row_separable(recipe):
        return rows
    bytes_per_row = max(1, _source_bytes(recipe) // rows)
    return min(max(1, chunk_bytes // bytes_per_row), rows)


def _seams(recipe: Recipe) -> list[int]:
    """Rows of the first axis where another part of a concatenation begins: chunks that end there join nothing."""
    match recipe:
        case Concat(axis=0):
            return list(accumulate(part.shape[0] for part in recipe.parts[:-1]))
        case Cast() | QuantizedValues() | UnsignedBlocks():
            return _seams(recipe.of)
        case TiledValues():
            return [row // TILE_ROWS for row in _seams(recipe.of) if row % TILE_ROWS == 0]
        case _:
            return []


def _kept(values: np.ndarray) -> np.ndarray:
    """A copy of what may be a view of the checkpoint's file."""
    return values if values.flags.writeable else values.copy()


def cast_array(values: np.ndarray, source: DType, target: DType, threads: int = 0) -> np.ndarray:
    """`values` (of `source`) as `target`, rounding to nearest even."""
    if source is target:
        return values
    if source in _CONVERTED and target in _CONVERTED and values.size >= _WORTH_THREADS:
        return convert(values, target.value, threads=threads)
    assert DType.INT4 not in (source, target), "int4 is made by quantization, not by a cast"
    return values.astype(target.numpy)


def _transpose_into(result: np.ndarray, first: int, values: np.ndarray) -> None:
    """`result[:, first : first + len(values)] = values.T`."""
    if values.itemsize in (2, 4):
        transpose_into(result, first, values)
        return
    for start in range(0, len(values), _BAND):
        result[:, first + start : first + start + _BAND] = values[start : start + _BAND].T


def _extent(recipe: Recipe) -> int:
    return recipe.shape[0] if recipe.shape else 1


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _storage_shape(recipe: Recipe) -> tuple[int, ...]:
    if recipe.dtype is DType.INT4:
        return (*recipe.shape[:-1], recipe.shape[-1] // 2)
    return recipe.shape


def _source_bytes(recipe: Recipe) -> int:
    if isinstance(recipe, Source):
        return recipe.nbytes
    if isinstance(recipe, KeptValues):
        return 2 * recipe.nbytes
    return sum(_source_bytes(operand) for operand in recipe.operands)


def _passes_rows(recipe: Recipe) -> bool:
    match recipe:
        case Reshape():
            return bool(recipe.shape) and bool(recipe.of.shape) and recipe.shape[0] == recipe.of.shape[0]
        case Transpose():
            return recipe.permutation[0] == 0
        case Slice() | Concat():
            return recipe.axis != 0
        case _:
            return False


def _rows_split(recipe: Reshape) -> int:
    """How many rows of a reshape come from each row of its operand; 0 when rows are joined or regrouped."""
    if not recipe.shape or not recipe.of.shape or not recipe.of.shape[0] or recipe.shape[-1] != recipe.of.shape[-1]:
        return 0
    ratio, rest = divmod(recipe.shape[0], recipe.of.shape[0])
    return ratio if not rest else 0


def is_row_separable(recipe: Recipe) -> bool:
    """Whether rows of the result can be made without the others."""
    if isinstance(recipe, Source):
        return bool(recipe.shape)
    if isinstance(recipe, Stack | Zeros):
        return True
    if isinstance(recipe, Reshape) and _rows_split(recipe):
        return is_row_separable(recipe.of)
    if isinstance(recipe, Reshape | Transpose) and not _passes_rows(recipe):
        return prod(recipe.shape) == 0
    return all(is_row_separable(operand) for operand in recipe.operands)
