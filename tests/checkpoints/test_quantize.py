"""Quantization to blocks and dtype conversion against numpy, bit for bit."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm import _native
from trtllm.checkpoints.quantize import BLOCK_SIZES, DTYPES, convert, quantize_blocks, tile, transpose_into

FLOATS = [pytest.param(dtype, id=name) for name, dtype in DTYPES.items()]


def reference(x, bits, block_size, scale_dtype="float32"):
    """The definition in numpy: integers [N, K] as int8, scales [N, K/block_size]."""
    rows, columns = x.shape
    blocks = x.astype(np.float32).reshape(rows, columns // block_size, block_size)
    largest = np.abs(blocks).max(-1)
    if bits == 4:
        negative = (blocks == -largest[..., None]).any(-1)
        scales = np.where(negative, -largest, largest) / np.float32(-8)
    else:
        scales = largest / np.float32(127)
    stored = np.dtype(DTYPES[scale_dtype])
    scales = (scales + np.float32(0)).astype(stored) + stored.type(0)  # no negative zeros
    divisor = np.where(scales == 0, np.inf, scales.astype(np.float32))[..., None].astype(np.float32)
    lowest, highest = (-8, 7) if bits == 4 else (-127, 127)
    integers = np.clip(np.rint(blocks / divisor), lowest, highest).astype(np.int8)
    return integers.reshape(rows, columns), scales


def pack(integers):
    """Two's complement nibbles, element 2i in the low one."""
    nibbles = integers.astype(np.uint8) & 0xF
    return nibbles[:, ::2] | (nibbles[:, 1::2] << 4)


def unpack(packed):
    """The inverse of pack()."""
    nibbles = np.stack([packed & 0xF, packed >> 4], -1).reshape(packed.shape[0], -1).astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles)


def assert_equals_reference(x, bits, block_size, scale_dtype):
    values, scales = quantize_blocks(x, bits, block_size, scale_dtype)
    integers, expected_scales = reference(x, bits, block_size, scale_dtype)
    np.testing.assert_array_equal(values, pack(integers) if bits == 4 else integers)
    np.testing.assert_array_equal(scales.view(f"u{scales.itemsize}"), expected_scales.view(f"u{scales.itemsize}"))
    assert scales.dtype == np.dtype(DTYPES[scale_dtype])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_random_matrices_equal_the_reference(dtype, bits, block_size, scale_dtype):
    random = np.random.default_rng(block_size)
    x = (random.standard_normal((37, 768)) * 10.0 ** random.uniform(-3, 3, (37, 1))).astype(dtype)
    assert_equals_reference(x, bits, block_size, scale_dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
def test_scalar_and_vector_code_give_the_same_bits(dtype, bits):
    x = np.random.default_rng(0).standard_normal((16, 512)).astype(dtype)
    expected = quantize_blocks(x, bits, 32, "float16")
    values, scales = np.empty_like(expected.values), np.empty_like(expected.scales)
    words = x if x.itemsize == 4 else x.view(np.uint16)
    _native.quantize_blocks(words, x.dtype.name, bits, 32, values, scales.view(np.uint16), "float16", scalar=True)
    np.testing.assert_array_equal(values, expected.values)
    np.testing.assert_array_equal(scales, expected.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scale_dtype", DTYPES)
@pytest.mark.parametrize(
    "element",
    [0.0, -0.0, 1e-45, -1e-45, 1e-40, 1e-38, 6e-8, 1.0, -1.0, 65504.0, -131000.0],
)
def test_edge_values_equal_the_reference(bits, scale_dtype, element):
    x = np.zeros((2, 64), np.float32)
    x[0, 3] = x[1, 33] = element
    x[1, 40] = -element / 3
    assert_equals_reference(x, bits, 32, scale_dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_float32_survives_with_float32_scales(bits):
    x = np.full((1, 16), np.finfo(np.float32).max, np.float32)
    assert_equals_reference(x, bits, 16, "float32")


@pytest.mark.parametrize("bits", [4, 8])
def test_ties_round_to_even(bits):
    top = 8.0 if bits == 4 else 127.0
    x = np.zeros((1, 16), np.float32)
    x[0, :6] = [-top, 0.5, 1.5, 2.5, -0.5, -1.5]
    values, scales = quantize_blocks(x, bits, 16)
    integers = unpack(values) if bits == 4 else values
    assert scales[0, 0] == 1.0
    assert integers[0, :6].tolist() == [-top, 0, 2, 2, 0, -2]


def test_of_two_elements_as_large_the_negative_sets_the_scale():
    x = np.zeros((1, 16), np.float32)
    x[0, :2] = [4.0, -4.0]
    values, scales = quantize_blocks(x, 4, 16)
    assert scales[0, 0] == 0.5
    assert unpack(values)[0, :2].tolist() == [7, -8]


def test_zero_blocks_have_positive_zero_scales():
    values, scales = quantize_blocks(np.full((1, 32), -0.0, np.float32), 4, 32, "float16")
    assert not values.any()
    assert scales.view(np.uint16)[0, 0] == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_their_row(dtype, bits, bad):
    x = np.ones((9, 64), dtype)
    x[5, 63] = bad
    with pytest.raises(ValueError, match="row 5 holds NaN or infinity"):
        quantize_blocks(x, bits, 32)


def test_the_first_bad_row_is_named_whatever_the_threads():
    x = np.ones((4096, 256), np.float32)
    x[[1000, 3000], 7] = np.nan
    for threads in (1, 2, 7):
        with pytest.raises(ValueError, match="row 1000 "):
            quantize_blocks(x, 4, 32, threads=threads)


def test_a_scale_that_float16_cannot_hold_is_refused():
    x = np.ones((3, 32), np.float32)
    x[2, 0] = 1e8
    with pytest.raises(ValueError, match="row 2 needs a scale too large for float16"):
        quantize_blocks(x, 4, 32, "float16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((2, 48), np.float32), 4, 32), "K = 48 is no multiple of block_size 32"),
        ((np.ones((2, 64), np.float32), 5, 32), "bits is 4 or 8, not 5"),
        ((np.ones((2, 64), np.float32), 4, 8), "block_size is one of"),
        ((np.ones((2, 64), np.float64), 4, 32), "dtype float64 is none of"),
        ((np.ones(64, np.float32), 4, 32), "has shape"),
        ((np.ones((2, 64), np.float32), 4, 32, "int8"), "scale_dtype is one of"),
    ],
)
def test_wrong_requests_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize_blocks(*arguments)


def test_the_result_does_not_depend_on_threads_or_layout():
    x = np.random.default_rng(1).standard_normal((1024, 1024)).astype(ml_dtypes.bfloat16)
    one = quantize_blocks(x, 4, 32, threads=1)
    three = quantize_blocks(np.asfortranarray(x), 4, 32, threads=3)
    np.testing.assert_array_equal(one.values, three.values)
    np.testing.assert_array_equal(one.scales, three.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 16, 30, 4100])
@pytest.mark.parametrize("search", [False, True])
def test_tiled_values_are_the_tiles_of_the_values(bits, rows, search):
    x = np.random.default_rng(rows).standard_normal((rows, 96 if search else 512), np.float32)
    x[rows // 2, :32] = 0
    plain = quantize_blocks(x, bits, 32, "float16", search=search)
    tiled = quantize_blocks(x, bits, 32, "float16", search=search, tiled=True, threads=3)
    assert np.array_equal(tiled.values, tile(plain.values, bits, x.shape[1] // 32))
    assert np.array_equal(tiled.scales.view(np.uint16), plain.scales.view(np.uint16))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (32, 64), (33, 40), (7, 100), (96, 31), (0, 5)])
def test_a_transposed_part_lies_where_it_belongs(dtype, rows, columns):
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(dtype)
    result = np.full((columns, rows + 9), 7, dtype)
    transpose_into(result, 5, values)
    assert np.array_equal(result[:, 5 : 5 + rows], values.T)
    assert (result[:, :5] == 7).all() and (result[:, 5 + rows :] == 7).all()


def test_tiles_are_laid_out_as_the_kernel_reads_them():
    rng = np.random.default_rng(3)
    for bits, lowest in ((4, -8), (8, -127)):
        integers = rng.integers(lowest, -lowest, (40, 64)).astype(np.int8)
        values = pack(integers) if bits == 4 else integers
        padded = np.zeros((48, 64), np.int16)
        padded[:40] = integers
        unsigned = (padded + (8 if bits == 4 else 128)).reshape(3, 16, 2, 32).transpose(0, 2, 1, 3)
        if bits == 8:  # four integers of a row side by side, then those of the next row
            wanted = unsigned.reshape(3, 2, 16, 8, 4).transpose(0, 1, 3, 2, 4)
        else:  # element 16 + i lies above element i
            pairs = unsigned[..., :16] | unsigned[..., 16:] << 4
            wanted = pairs.reshape(3, 2, 16, 4, 4).transpose(0, 1, 3, 2, 4)
        assert np.array_equal(tile(values, bits, 2), wanted.reshape(3, 2, -1).astype(np.uint8))


@pytest.mark.parametrize("row", [0, 17, 40])
def test_a_fault_in_a_tile_is_named_by_its_row(row):
    x = np.ones((41, 64), np.float32)
    x[row, 40] = np.nan
    with pytest.raises(ValueError, match=f"^row {row} holds NaN"):
        quantize_blocks(x, 4, 32, "float16", tiled=True)


def test_read_only_and_empty_matrices_are_taken():
    x = np.ones((2, 32), np.float32)
    x.flags.writeable = False
    assert quantize_blocks(x, 8, 32).values.tolist() == [[127] * 32] * 2
    assert quantize_blocks(np.ones((0, 32), np.float32), 4, 32).values.shape == (0, 16)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=32, max_size=32),
    st.sampled_from([4, 8]),
    st.sampled_from([16, 32]),
)
def test_an_element_is_off_by_half_a_step_at_most_unless_clamped(elements, bits, block_size):
    x = np.array([elements], np.float32)
    values, scales = quantize_blocks(x, bits, block_size)
    integers = (unpack(values) if bits == 4 else values).astype(np.float64)
    steps = np.repeat(scales.astype(np.float64), block_size, axis=1)
    inside = np.abs(x.astype(np.float64)) <= np.abs(steps) * (7.5 if bits == 4 else 127.5)
    allowed = np.abs(steps) / 2 * (1 + 1e-5) + 1e-44
    assert (np.abs(x - integers * steps) <= allowed)[inside].all()


def _bit_patterns(dtype):
    if dtype == np.float32:
        patterns = np.random.default_rng(2).integers(0, 1 << 32, 1 << 20, np.uint32)
        edges = np.array([0x477FEFFF, 0x477FF000, 0x38800000, 0x387FFFFF, 0x33000000, 0x33000001, 1], np.uint32)
        return np.concatenate([patterns, edges, edges | 0x80000000]).view(np.float32)
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("to", list(DTYPES))
def test_conversion_equals_numpy_on_every_kind_of_bits(source, to):
    x = _bit_patterns(source)
    result = convert(x, to)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(np.float32).astype(DTYPES[to])
    assert result.dtype == expected.dtype
    assert result is not x
    nan = np.isnan(x.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(result.astype(np.float32)), nan)
    words = f"u{result.itemsize}"
    np.testing.assert_array_equal(result[~nan].view(words), expected[~nan].view(words))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 17])
@pytest.mark.parametrize("to", ["float16", "bfloat16"])
def test_conversion_of_a_few_elements_uses_the_scalar_code(length, to):
    x = np.array([1e-8, 65519.9, 65520.0, -3.1e-5, np.inf, 1.0, -0.0], np.float32)[np.arange(length) % 7]
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(convert(x, to), x.astype(DTYPES[to]))


def test_conversion_keeps_the_shape():
    assert convert(np.ones((2, 3, 5), np.float16), "bfloat16").shape == (2, 3, 5)


def test_conversion_refuses_other_dtypes():
    with pytest.raises(ValueError, match="cannot convert to 'int8'"):
        convert(np.ones(3, np.float32), "int8")
