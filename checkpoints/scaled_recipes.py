"""Recipe steps of weights in small formats with floating scales, e4m3, int8 and e2m1, and their kernel's layout."""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from trtllm.checkpoints.recipes import TILE_ROWS, Recipe, _Unary
from trtllm.dtypes import DType

Element = Literal["e4m3", "e2m1", "int8", "e8m0"]
"""A small format. e8m0 holds powers of two only, and is for scales."""
LARGEST: dict[Element, float] = {"e4m3": 448.0, "e2m1": 6.0, "int8": 127.0}
STORED: dict[Element, DType] = {
    "e4m3": DType.FLOAT8_E4M3, "e2m1": DType.UINT8, "int8": DType.INT8, "e8m0": DType.UINT8
}  # fmt: skip
"""e2m1 is stored in pairs along the last axis, the even element in the low nibble; e8m0 as its exponent plus 127."""


@dataclass(frozen=True)
class Constants(Recipe):
    """A vector of float32 that is part of the recipe: what calibration measured."""

    step = "constants"
    data: str
    """Base64 of its little-endian bytes."""

    @classmethod
    def of(cls, values: np.ndarray) -> Constants:
        return cls(b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode())

    @property
    def values(self) -> np.ndarray:
        return np.frombuffer(b64decode(self.data), "<f4")

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(b64decode(self.data)) // 4,)

    @property
    def dtype(self) -> DType:
        return DType.FLOAT32


@dataclass(frozen=True)
class ChannelScaled(_Unary):
    """`of` times `by` [K] along the last axis, or divided by it, in float32 and back in `of`'s dtype."""

    step = "channel_scaled"
    by: Recipe
    divides: bool = False


@dataclass(frozen=True)
class RowScaled(_Unary):
    """Each row of `of` [N, K] times its element of `by` [N], or divided by it, in float32 and back in `of`'s dtype."""

    step = "row_scaled"
    by: Recipe
    divides: bool = False


@dataclass(frozen=True)
class BlockScales(_Unary):
    """Float32 [ceil(N / rows), ceil(K / columns)]: the largest magnitude of each block of [N, K], divided by `largest`.

    0 rows or columns mean all of them.
    """

    step = "block_scales"
    largest: float
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        count, inputs = self.of.shape
        return (-(-count // (self.rows or count)), -(-inputs // (self.columns or inputs)))

    @property
    def dtype(self) -> DType:
        return DType.FLOAT32


@dataclass(frozen=True)
class PowerScales(_Unary):
    """The e8m0 scales of the OCP microscaling formats: 2^(floor(log2(of)) - exponent), `of` a largest magnitude."""

    step = "power_scales"
    exponent: int

    @property
    def dtype(self) -> DType:
        return DType.UINT8


@dataclass(frozen=True)
class ScaledBy(_Unary):
    """Scales in e4m3 or e8m0 as float32, times a scalar [1, 1]."""

    step = "scaled_by"
    by: Recipe | None
    element: Element

    @property
    def dtype(self) -> DType:
        return DType.FLOAT32


@dataclass(frozen=True)
class RoundedBy(_Unary):
    """`of` [N, K] divided by the scale of each element's block in float32, as the nearest value of a format.

    Halves go to even; what is too large becomes the largest. Where a scale is 0 the values are.
    """

    step = "rounded_by"
    by: Recipe
    element: Element
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        count, inputs = self.of.shape
        return (count, inputs // 2 if self.element == "e2m1" else inputs)

    @property
    def dtype(self) -> DType:
        return STORED[self.element]


@dataclass(frozen=True)
class RowScales(_Unary):
    """Scales [ceil(N / rows), B] once for each of N rows; 0 rows mean one scale for all."""

    step = "row_scales"
    count: int
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.of.shape[1:])


@dataclass(frozen=True)
class LaneTiles(_Unary):
    """The bytes of rows [N, B] in tiles of 16 rows: uint8 [ceil(N / 16), B / group, 16 * group], padded with zeros.

    The layout of the `trtllm.cpu` ScaledLinear kernel (runtime/native/scaled_linear.h); `flips` adds 128 to each byte.
    """

    step = "lane_tiles"
    group: int
    flips: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        width = self.of.dtype.byte_size(prod(self.of.shape[1:]))
        return (-(-self.of.shape[0] // TILE_ROWS), width // self.group, TILE_ROWS * self.group)

    @property
    def dtype(self) -> DType:
        return DType.UINT8


STEPS: dict[str, type[Recipe]] = {
    cls.step: cls
    for cls in (
        Constants, ChannelScaled, RowScaled, BlockScales, PowerScales, ScaledBy, RoundedBy, RowScales, LaneTiles
    )
}  # fmt: skip


class ScaledRows:
    """Evaluates these steps; `rows` gives those of any recipe. Scales that need the whole weight are kept."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self._kept: dict[BlockScales, np.ndarray] = {}

    def __call__(self, recipe: Recipe, start: int, stop: int) -> np.ndarray:
        match recipe:
            case Constants():
                return recipe.values[start:stop]
            case ChannelScaled():
                return self._channel_scaled(recipe, start, stop)
            case RowScaled():
                factors = self._rows(recipe.by, start, stop)[:, None]
                return _times(self._rows(recipe.of, start, stop), factors, divides=recipe.divides)
            case BlockScales():
                return self._block_scales(recipe)[start:stop]
            case PowerScales():
                return power_scales(self._rows(recipe.of, start, stop), recipe.exponent)
            case ScaledBy():
                return self._scaled_by(recipe, start, stop)
            case RoundedBy():
                return self._rounded(recipe, start, stop)
            case RowScales():
                whole = self._rows(recipe.of, 0, recipe.of.shape[0])
                return whole[np.arange(start, stop) // (recipe.rows or recipe.count)]
            case _:
                assert isinstance(recipe, LaneTiles)
                return self._tiles(recipe, start, stop)

    def _channel_scaled(self, recipe: ChannelScaled, start: int, stop: int) -> np.ndarray:
        values, factors = self._rows(recipe.of, start, stop), self._rows(recipe.by, 0, recipe.by.shape[0])
        if len(recipe.of.shape) == 1:
            factors = factors[start:stop]
        return _times(values, factors, divides=recipe.divides)

    def _block_scales(self, recipe: BlockScales) -> np.ndarray:
        if recipe not in self._kept:
            count, inputs = recipe.of.shape
            band = recipe.rows or _BAND
            result = np.zeros(recipe.shape, np.float32)
            edges = np.arange(0, inputs, recipe.columns or inputs)
            for start in range(0, count, band * max(1, _BAND // band)):
                stop = min(start + band * max(1, _BAND // band), count)
                values = np.abs(self._rows(recipe.of, start, stop).astype(np.float32))
                columns = np.maximum.reduceat(values, edges, axis=1)
                places = np.arange(start, stop) // (recipe.rows or count)
                np.maximum.at(result, places, columns)
            self._kept[recipe] = result / np.float32(recipe.largest)
        return self._kept[recipe]

    def _scaled_by(self, recipe: ScaledBy, start: int, stop: int) -> np.ndarray:
        stored = self._rows(recipe.of, start, stop)
        values = np.ldexp(np.float32(1), stored.astype(np.int32) - 127) if recipe.element == "e8m0" else stored
        wide = values.astype(np.float32)
        return wide if recipe.by is None else wide * self._rows(recipe.by, 0, 1).reshape(())

    def _rounded(self, recipe: RoundedBy, start: int, stop: int) -> np.ndarray:
        count, inputs = recipe.of.shape
        rows = recipe.rows or count
        first = start // rows
        scales = self._rows(recipe.by, first, -(-stop // rows))[np.arange(start, stop) // rows - first]
        wide = np.repeat(scales, recipe.columns or inputs, axis=1)[:, :inputs]
        values = self._rows(recipe.of, start, stop).astype(np.float32)
        quotient = np.divide(values, wide, out=np.zeros_like(values), where=wide > 0)
        return nearest(quotient, recipe.element)

    def _tiles(self, recipe: LaneTiles, start: int, stop: int) -> np.ndarray:
        rows = self._rows(recipe.of, start * TILE_ROWS, min(stop * TILE_ROWS, recipe.of.shape[0]))
        data = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
        _, groups, _ = recipe.shape
        padded = np.zeros(((stop - start) * TILE_ROWS, data.shape[1]), np.uint8)
        padded[: len(data)] = data
        if recipe.flips:
            padded ^= 0x80
        tiles = padded.reshape(stop - start, TILE_ROWS, groups, recipe.group).transpose(0, 2, 1, 3)
        return tiles.reshape(stop - start, *recipe.shape[1:])


def _times(values: np.ndarray, factors: np.ndarray, *, divides: bool) -> np.ndarray:
    """In float32, and back in the type of the values."""
    wide = values.astype(np.float32)
    return (wide / factors if divides else wide * factors).astype(values.dtype)


_BAND = 256
"""Rows that are looked at together."""


def nearest(values: np.ndarray, element: Element) -> np.ndarray:
    """The nearest values of a format in storage form; halves to even, saturating. float32 [N, K]."""
    import ml_dtypes

    if element == "int8":
        return np.clip(np.rint(values), -127, 127).astype(np.int8)
    clipped = np.clip(values, -LARGEST[element], LARGEST[element])
    if element == "e4m3":
        return clipped.astype(ml_dtypes.float8_e4m3fn)
    codes = clipped.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def power_scales(largest: np.ndarray, exponent: int) -> np.ndarray:
    """Biased exponents of 2^(floor(log2(largest)) - exponent); 0 for what is 0."""
    _, powers = np.frexp(largest)  # largest = m * 2^power, 0.5 <= m < 1
    biased = np.clip(powers - 1 - exponent + 127, 0, 254)
    return np.where(largest > 0, biased, 0).astype(np.uint8)
