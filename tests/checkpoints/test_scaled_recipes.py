"""Small formats against independent renderings: every value from the list of a format's values, never from a cast."""

import json

import numpy as np
import pytest

from trtllm.checkpoints.checkpoint import FunctionTensor, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Source, recipe_from_json
from trtllm.checkpoints.scaled_recipes import (
    BlockScales,
    ChannelScaled,
    Constants,
    LaneTiles,
    PowerScales,
    RoundedBy,
    RowScaled,
    RowScales,
    ScaledBy,
)
from trtllm.dtypes import DType

E4M3 = [
    (-1) ** (code >> 7) * (2.0 ** ((code >> 3 & 15) - 7) * (1 + (code & 7) / 8) if code >> 3 & 15 else (code & 7) / 512)
    for code in range(256)
]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def _nearest(value: float, values: list[float], skip: tuple[int, ...] = ()) -> int:
    """The code of the nearest value, halves to the even code; the sign of zero follows the value."""
    codes = [code for code in range(len(values)) if code not in skip and np.signbit(values[code]) == np.signbit(value)]
    return min(codes, key=lambda code: (abs(values[code] - value), code % 2))


@pytest.fixture
def weight() -> tuple[Source, RecipeReader, np.ndarray]:
    random = np.random.default_rng(5)
    array = (random.normal(size=(35, 96)) * np.exp2(random.integers(-6, 6, (35, 96)))).astype(np.float32)
    array[3] = 0
    spec = TensorSpec("w", array.shape, DType.FLOAT32)
    reader = RecipeReader({"w": FunctionTensor(spec, lambda start, stop: array[start:stop].copy())}, chunk_bytes=4000)
    return Source.of(spec), reader, array


def _stored(reader: RecipeReader, recipe: object) -> np.ndarray:
    """The payload as it is written: in chunks, of the recipe as it comes back from JSON."""
    again = recipe_from_json(json.loads(json.dumps(recipe.to_json())))  # type: ignore[attr-defined]
    assert again == recipe
    pieces = list(reader.chunks(again))
    whole = np.concatenate([piece.reshape(len(piece), -1) for piece in pieces])
    assert whole.size * whole.itemsize == recipe.nbytes  # type: ignore[attr-defined]
    return whole


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 0), (16, 64)])
@pytest.mark.parametrize(("element", "largest"), [("e4m3", 448.0), ("int8", 127.0)])
def test_values_are_the_nearest_of_the_format(weight, element, largest, rows, columns) -> None:
    source, reader, array = weight
    scales = BlockScales(source, largest, rows, columns)
    stored, grid = _stored(reader, RoundedBy(source, scales, element, rows, columns)), _stored(reader, scales)
    for n in range(0, 35, 2):
        for k in range(0, 96, 5):
            high, wide = rows or 35, columns or 96
            top, left = n // high * high, k // wide * wide
            scale = np.abs(array[top : top + high, left : left + wide]).max() / np.float32(largest)
            assert grid[n // high, k // wide] == scale
            quotient = float(array[n, k] / scale) if scale else 0.0
            if element == "int8":
                assert stored[n, k] == int(np.rint(quotient))
            else:
                assert stored.view(np.uint8)[n, k] == _nearest(quotient, E4M3, (127, 255))


def _pairs(stored: np.ndarray, n: int, k: int) -> int:
    return int(stored[n, k // 2] >> 4 * (k % 2)) & 15


def test_nvfp4_has_two_levels_of_scales(weight) -> None:
    source, reader, array = weight
    factor = BlockScales(source, 6 * 448.0, 0, 0)
    scales = RoundedBy(BlockScales(source, 6.0, 1, 16), factor, "e4m3", 0, 0)
    stored = _stored(reader, RoundedBy(source, ScaledBy(scales, factor, "e4m3"), "e2m1", 1, 16))
    codes, whole = _stored(reader, scales).view(np.uint8), np.abs(array).max() / np.float32(6 * 448)
    for n in range(35):
        for k in range(0, 96, 7):
            block = np.abs(array[n, k // 16 * 16 : k // 16 * 16 + 16]).max() / np.float32(6)
            code = _nearest(float(block / whole), E4M3, (127, 255))
            assert codes[n, k // 16] == code
            scale = np.float32(E4M3[code]) * whole
            assert _pairs(stored, n, k) == _nearest(float(array[n, k] / scale) if scale else 0.0, E2M1)


def test_mxfp4_scales_are_the_powers_of_two_of_the_microscaling_formats(weight) -> None:
    source, reader, array = weight
    scales = PowerScales(BlockScales(source, 1.0, 1, 32), 2)
    stored = _stored(reader, RoundedBy(source, ScaledBy(scales, None, "e8m0"), "e2m1", 1, 32))
    exponents = _stored(reader, scales)
    for n in range(35):
        for k in range(0, 96, 7):
            largest = np.abs(array[n, k // 32 * 32 : k // 32 * 32 + 32]).max()
            exponent = int(np.floor(np.log2(largest))) - 2 if largest else -127
            assert exponents[n, k // 32] == exponent + 127
            quotient = float(array[n, k]) / 2.0**exponent if largest else 0.0
            assert _pairs(stored, n, k) == _nearest(quotient, E2M1)


def test_tiles_hold_sixteen_rows_side_by_side_and_pad_with_zeros(weight) -> None:
    source, reader, _ = weight
    values = RoundedBy(source, BlockScales(source, 127.0, 1, 0), "int8", 1, 0)
    plain, tiles = reader.read(values), _stored(reader, LaneTiles(values, 4, flips=True)).reshape(3, 24, 16, 4)
    for n in range(48):
        for k in range(96):
            expected = int(plain[n, k]) + 128 if n < 35 else 128
            assert tiles[n // 16, k // 4, n % 16, k % 4] == expected


def test_scales_of_row_blocks_are_repeated_for_each_row(weight) -> None:
    source, reader, _ = weight
    scales = BlockScales(source, 448.0, 16, 64)
    np.testing.assert_array_equal(_stored(reader, RowScales(scales, 35, 16)), reader.read(scales)[np.arange(35) // 16])


def test_a_vector_in_a_recipe_divides_one_weight_and_multiplies_the_other(weight) -> None:
    source, reader, array = weight
    vector = np.random.default_rng(1).uniform(0.5, 2, 96).astype(np.float32)
    np.testing.assert_array_equal(_stored(reader, ChannelScaled(source, Constants.of(vector))), array * vector)
    row = Constants.of(array[0])
    np.testing.assert_array_equal(
        reader.read(ChannelScaled(row, Constants.of(vector), divides=True)), array[0] / vector
    )


def test_a_vector_divides_or_multiplies_rows(weight) -> None:
    source, reader, array = weight
    rows = np.random.default_rng(2).uniform(0.5, 2, 35).astype(np.float32)
    np.testing.assert_array_equal(_stored(reader, RowScaled(source, Constants.of(rows))), array * rows[:, None])
    divided = RowScaled(source, Constants.of(rows), divides=True)
    np.testing.assert_array_equal(_stored(reader, divided), array / rows[:, None])
