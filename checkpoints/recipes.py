"""Recipes: how an engine's weight is made from a checkpoint's tensors, as values that can be stored and rerun.

A recipe is an expression over source tensors. It knows its result's shape and dtype without reading anything,
round-trips through JSON, and is evaluated by `trtllm.checkpoints.evaluation`.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from functools import cache, cached_property
from math import prod
from typing import Any, ClassVar

from trtllm.checkpoints.checkpoint import TensorSpec
from trtllm.dtypes import DType


@dataclass(frozen=True)
class Recipe:
    """A node of the expression; subclasses are the steps."""

    step: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]:
        raise AssertionError("abstract")

    @property
    def dtype(self) -> DType:
        raise AssertionError("abstract")

    @cached_property
    def operands(self) -> tuple[Recipe, ...]:
        names = _field_names(type(self))  # type: ignore[arg-type]  # a class is hashed as itself
        return tuple(value for name in names for value in _recipes_in(getattr(self, name)))

    def sources(self) -> tuple[str, ...]:
        """Names of the checkpoint tensors it reads, in order, without repeats."""
        if isinstance(self, Source):
            return (self.name,)
        return tuple(dict.fromkeys(name for operand in self.operands for name in operand.sources()))

    @property
    def nbytes(self) -> int:
        return self.dtype.byte_size(prod(self.shape))

    def to_json(self) -> dict[str, Any]:
        names = _field_names(type(self))  # type: ignore[arg-type]  # a class is hashed as itself
        return {"step": self.step} | {name: _encode(getattr(self, name)) for name in names}


@cache
def _field_names(step: type[Recipe]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(step))


def _recipes_in(value: Any) -> tuple[Recipe, ...]:
    if isinstance(value, Recipe):
        return (value,)
    if isinstance(value, tuple):
        return tuple(item for item in value if isinstance(item, Recipe))
    return ()


def _encode(value: Any) -> Any:
    if isinstance(value, Recipe):
        return value.to_json()
    if isinstance(value, DType):
        return value.value
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


@dataclass(frozen=True)
class Source(Recipe):
    """A tensor of the checkpoint, as stored."""

    step = "source"
    name: str
    source_shape: tuple[int, ...]
    source_dtype: DType

    @classmethod
    def of(cls, spec: TensorSpec) -> Source:
        return cls(spec.name, spec.shape, spec.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source_shape

    @property
    def dtype(self) -> DType:
        return self.source_dtype


@dataclass(frozen=True)
class Stored(Source):
    """A tensor that calibration made; it lies beside the checkpoint's own and cannot be made from those alone."""

    step = "stored"
    sha256: str
    """Of its payload, in hex."""


@dataclass(frozen=True)
class _Unary(Recipe):
    of: Recipe

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def dtype(self) -> DType:
        return self.of.dtype


@dataclass(frozen=True)
class Cast(_Unary):
    """Element type conversion, round to nearest even."""

    step = "cast"
    to: DType

    @property
    def dtype(self) -> DType:
        return self.to


@dataclass(frozen=True)
class Affine(_Unary):
    """`of * scale + offset` in float32, back in `of`'s dtype (a Gemma norm is w + 1)."""

    step = "affine"
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Transpose(_Unary):
    """Axes permuted as by numpy.transpose."""

    step = "transpose"
    permutation: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.of.shape[axis] for axis in self.permutation)


@dataclass(frozen=True)
class Reshape(_Unary):
    """The same elements in row-major order under another shape."""

    step = "reshape"
    to: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.to


@dataclass(frozen=True)
class Slice(_Unary):
    """`start:stop` along one axis."""

    step = "slice"
    axis: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.of.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)


@dataclass(frozen=True)
class Concat(Recipe):
    """Parts joined along an axis."""

    step = "concat"
    parts: tuple[Recipe, ...]
    axis: int

    @cached_property
    def _shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> DType:
        return self.parts[0].dtype


@dataclass(frozen=True)
class Stack(Recipe):
    """Parts of one shape, stacked on a new first axis."""

    step = "stack"
    parts: tuple[Recipe, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.parts[0].shape)

    @property
    def dtype(self) -> DType:
        return self.parts[0].dtype


@dataclass(frozen=True)
class QuantizedValues(_Unary):
    """Integers of a block-wise symmetric quantization along the last axis; see `trtllm.checkpoints.quantize`."""

    step = "quantized_values"
    bits: int
    block_size: int
    scale_dtype: DType
    search: bool = False
    """Whether 4-bit blocks take the scales of least squared error."""

    @property
    def dtype(self) -> DType:
        return DType.INT4 if self.bits == 4 else DType.INT8


@dataclass(frozen=True)
class QuantizedScales(_Unary):
    """Scales of the same quantization: one per block of the last axis."""

    step = "quantized_scales"
    bits: int
    block_size: int
    scale_dtype: DType
    search: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.of.shape[:-1], self.of.shape[-1] // self.block_size)

    @property
    def dtype(self) -> DType:
        return self.scale_dtype


@dataclass(frozen=True)
class Dequantized(_Unary):
    """What the integers of a `QuantizedValues` stand for: each times its block's scale, rounded once to `to`."""

    step = "dequantized"
    to: DType

    @property
    def dtype(self) -> DType:
        return self.to


@dataclass(frozen=True)
class KeptValues(_Unary):
    """Integers of a source that the checkpoint holds quantized; see `trtllm.checkpoints.stored`.

    `offset` ("none", "minimum", "zero_point") is the form that is wanted, which may be wider than the stored one: with
    an offset the integers of 4 bits count from 0, and int4 holds them less 8.
    """

    step = "kept_values"
    bits: int
    offset: str

    @property
    def dtype(self) -> DType:
        return DType.INT4 if self.bits == 4 else DType.INT8


@dataclass(frozen=True)
class KeptScales(_Unary):
    """Their scales as float16, those of longer groups repeated: one per block of the last axis."""

    step = "kept_scales"
    block_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.of.shape[:-1], self.of.shape[-1] // self.block_size)

    @property
    def dtype(self) -> DType:
        return DType.FLOAT16


@dataclass(frozen=True)
class KeptOffsets(_Unary):
    """Their minima or zero points as float16, in the same blocks, for the values of the same `bits` and `offset`."""

    step = "kept_offsets"
    bits: int
    offset: str
    block_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.of.shape[:-1], self.of.shape[-1] // self.block_size)

    @property
    def dtype(self) -> DType:
        return DType.FLOAT16


@dataclass(frozen=True)
class AsymmetricValues(_Unary):
    """4-bit integers 0 .. 15 of a block-wise quantization with minima, rounded to nearest; int4 holds them less 8."""

    step = "asymmetric_values"
    block_size: int
    search: bool = False
    """Whether scales and minima are those of least squared error instead of those that fit the extremes."""

    @property
    def dtype(self) -> DType:
        return DType.INT4


@dataclass(frozen=True)
class AsymmetricScales(KeptScales):
    """Float16 scales of the same quantization: (largest - smallest) / 15, one per block of the last axis."""

    step = "asymmetric_scales"
    search: bool = False


@dataclass(frozen=True)
class AsymmetricMinima(KeptScales):
    """Float16 minima of the same quantization: an element is scale * integer + minimum."""

    step = "asymmetric_minima"
    search: bool = False


@dataclass(frozen=True)
class Zeros(Recipe):
    """Float16 zeros: the offsets of a part that has none beside parts that have."""

    step = "zeros"
    to: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.to

    @property
    def dtype(self) -> DType:
        return DType.FLOAT16


@dataclass(frozen=True)
class UnsignedBlocks(_Unary):
    """Signed int4/int8 values [..., K] as unsigned bytes [..., K/block, block*bits/8] with zero point 2^(bits-1).

    The layout of onnxruntime's MatMulNBits weight (contrib operator docs).
    """

    step = "unsigned_blocks"
    block_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, k = self.of.shape
        return (*lead, k // self.block_size, self.block_size * self.of.dtype.bits // 8)

    @property
    def dtype(self) -> DType:
        return DType.UINT8


@dataclass(frozen=True)
class TiledValues(_Unary):
    """Signed int4/int8 values [N, K] in tiles of 16 rows, uint8 [ceil(N/16), K/32, 16*32*bits/8].

    The layout of the `trtllm.cpu` QuantizedLinear kernel (runtime/native/quantized_linear.h); rows past N are zero.
    """

    step = "tiled_values"

    @property
    def shape(self) -> tuple[int, ...]:
        rows, k = self.of.shape
        return (-(-rows // TILE_ROWS), k // TILE_BLOCK, TILE_ROWS * TILE_BLOCK * self.of.dtype.bits // 8)

    @property
    def dtype(self) -> DType:
        return DType.UINT8


@dataclass(frozen=True)
class TiledScales(_Unary):
    """Float16 scales [N, K/32] in the same tiles: [ceil(N/16), K/32, 16]."""

    step = "tiled_scales"

    @property
    def shape(self) -> tuple[int, ...]:
        rows, blocks = self.of.shape
        return (-(-rows // TILE_ROWS), blocks, TILE_ROWS)


TILE_ROWS = 16
"""Rows of a weight that a tile holds."""
TILE_BLOCK = 32
"""Inputs of a block of a tile."""

_STEPS: dict[str, type[Recipe]] = {
    cls.step: cls
    for cls in (
        Source, Stored, Cast, Affine, Transpose, Reshape, Slice, Concat, Stack, QuantizedValues, QuantizedScales,
        Dequantized, KeptValues, KeptScales, KeptOffsets, AsymmetricValues, AsymmetricScales, AsymmetricMinima, Zeros,
        UnsignedBlocks, TiledValues, TiledScales,
    )
}  # fmt: skip


def recipe_from_json(data: dict[str, Any]) -> Recipe:
    """The recipe that `Recipe.to_json` wrote. Raises ValueError for an unknown step or field."""
    from trtllm.checkpoints.scaled_recipes import STEPS as SCALED_STEPS

    step = data.get("step", "")
    cls = _STEPS.get(step) or SCALED_STEPS.get(step)
    if cls is None:
        raise ValueError(f"unknown recipe step {data.get('step')!r}")
    known, needed = _known_fields(cls)  # type: ignore[arg-type]  # a class is hashed as itself
    given = {key: value for key, value in data.items() if key != "step"}
    if not needed <= given.keys() <= known:
        raise ValueError(f"recipe step '{cls.step}' has fields {sorted(given)}, expected {sorted(known)}")
    return cls(**{key: _decode(key, value) for key, value in given.items()})


@cache
def _known_fields(step: type[Recipe]) -> tuple[frozenset[str], frozenset[str]]:
    """All fields of a step, and those that have no default."""
    known = fields(step)
    return frozenset(field.name for field in known), frozenset(
        field.name for field in known if field.default is MISSING
    )


def _decode(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return recipe_from_json(value)
    if isinstance(value, list):
        return tuple(_decode(key, item) for item in value)
    if key in ("source_dtype", "scale_dtype") or (key == "to" and isinstance(value, str)):
        return DType.of(value)
    return value
