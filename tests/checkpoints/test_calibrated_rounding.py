"""Searched scales and GPTQ's columns against their definitions in numpy."""

import ml_dtypes
import numpy as np
import pytest

from trtllm.checkpoints.quantize import CountedBlocks, dequantize_blocks, gptq, quantize_blocks, quantize_counted

RANDOM = np.random.default_rng(23)


def weighted_errors(x, bits, weights, **options):
    """Of each block, against the scales as stored; float64 [N, blocks]."""
    values = dequantize_blocks(quantize_blocks(x, bits, 32, "float16", **options), bits).astype(np.float64)
    return (weights * np.square(values - x.astype(np.float64))).reshape(len(x), -1, 32).sum(-1)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("is_weighed", [False, True])
def test_no_block_errs_more_under_a_searched_scale(dtype, is_weighed) -> None:
    x = (RANDOM.normal(size=(64, 256)) * RANDOM.lognormal(sigma=2, size=(64, 1))).astype(dtype)
    importance = RANDOM.lognormal(size=256).astype(np.float32) if is_weighed else np.ones(256, np.float32)
    plain = weighted_errors(x, 4, importance)
    found = weighted_errors(x, 4, importance, search=True, importance=importance if is_weighed else None)
    # compared in float32 sums of 32 terms: two that differ by less than 32 roundings may change places
    assert (found <= plain * (1 + 32 * 1.2e-7)).all()
    assert found.sum() < 0.95 * plain.sum()


def test_eight_bits_keep_the_plain_scale() -> None:
    x = RANDOM.normal(size=(8, 64)).astype(np.float32)
    plain, searched = quantize_blocks(x, 8, 32, "float16"), quantize_blocks(x, 8, 32, "float16", search=True)
    assert (plain.values == searched.values).all() and (plain.scales == searched.scales).all()


def test_blocks_of_zeros_and_tiny_values_stay_zeros_under_a_search() -> None:
    x = np.zeros((2, 64), np.float32)
    x[1] = 1e-12
    found = quantize_blocks(x, 4, 32, "float16", search=True)
    assert not found.values.any() and not found.scales.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_search_refuses_what_is_not_finite(bad) -> None:
    x = np.ones((3, 32), np.float32)
    x[1, 5] = bad
    with pytest.raises(ValueError, match="row 1"):
        quantize_blocks(x, 4, 32, search=True)


def test_an_importance_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="importance"):
        quantize_blocks(np.ones((2, 64), np.float32), 4, 32, search=True, importance=np.ones(32, np.float32))


@pytest.mark.parametrize("threads", [1, 3])
def test_results_do_not_depend_on_threads(threads) -> None:
    x = RANDOM.normal(size=(512, 512)).astype(np.float32)
    one, other = (quantize_blocks(x, 4, 32, "float16", search=True, threads=count) for count in (2, threads))
    assert (one.values == other.values).all() and (one.scales.view("u2") == other.scales.view("u2")).all()


def counted_errors(x, weights, **options):
    made = dequantize_blocks(quantize_counted(x, 32, **options), 4).astype(np.float64)
    return (weights * np.square(made - x.astype(np.float64))).reshape(len(x), -1, 32).sum(-1)


@pytest.mark.parametrize("is_weighed", [False, True])
def test_no_block_errs_more_under_a_searched_minimum(is_weighed) -> None:
    x = (RANDOM.normal(size=(64, 256)) * RANDOM.lognormal(sigma=2, size=(64, 1)) + 1).astype(np.float32)
    importance = RANDOM.lognormal(size=256).astype(np.float32) if is_weighed else np.ones(256, np.float32)
    plain = counted_errors(x, importance)
    found = counted_errors(x, importance, search=True, importance=importance if is_weighed else None)
    # compared in float32 sums of 32 terms, and dequantized with two roundings of the largest element
    slack = 32 * 1.2e-7 * plain + importance.sum() * np.square(np.abs(x).max(1, keepdims=True) * 1.2e-7)
    assert (found <= plain + slack).all()
    assert found.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("search", [False, True])
def test_weights_on_a_grid_with_minima_are_kept_exactly(search) -> None:
    integers = RANDOM.integers(0, 16, (32, 8, 32))
    integers[..., 0], integers[..., 1] = 0, 15
    # scales of 5 bits and minima of 6 below 2^7: 15 * scale and the difference of two elements fit float32
    scales = (RANDOM.integers(1, 32, (32, 8, 1)) * 2.0**-10).astype(np.float16)
    minima = (RANDOM.integers(-64, 64, (32, 8, 1)) * 2.0**-8).astype(np.float16)
    x = (integers * scales.astype(np.float32) + minima.astype(np.float32)).reshape(32, 256)
    found = quantize_counted(x.astype(np.float32), 32, search=search)
    assert (found.scales == scales[..., 0]).all() and (found.minima == minima[..., 0]).all()
    assert (dequantize_blocks(found, 4) == x).all()


def test_minima_are_found_alike_on_any_number_of_threads() -> None:
    x = RANDOM.normal(size=(512, 512)).astype(np.float32)
    one, other = (quantize_counted(x, 32, search=True, threads=count) for count in (1, 3))
    assert all((left.view("u1") == right.view("u1")).all() for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize(("element", "words"), [(np.nan, "row 1 holds NaN"), (1e6, "row 1 holds values too large")])
def test_what_minima_cannot_hold_is_refused(element, words) -> None:
    x = np.ones((3, 64), np.float32)
    x[1, 5] = element
    with pytest.raises(ValueError, match=words):
        quantize_counted(x, 32)


def problem(rows=24, columns=96):
    """A weight and the second moments of dependent inputs."""
    weight = RANDOM.normal(size=(rows, columns)).astype(np.float32)
    inputs = RANDOM.normal(size=(500, columns)) @ RANDOM.normal(size=(columns, columns)) / 8
    return weight, inputs.T @ inputs + 0.1 * np.eye(columns)


def reference_gptq(weight, moments, scales, bits, order):
    """The published algorithm in float64 with given scales [N, blocks], one column after the other."""
    lowest, highest = (-8, 7) if bits == 4 else (-127, 127)
    factor = np.linalg.cholesky(np.linalg.inv(moments[order][:, order])).T
    rest, integers = weight[:, order].astype(np.float64), np.zeros(weight.shape)
    for j, column in enumerate(order):
        scale = scales[:, column // 32].astype(np.float64)
        integers[:, column] = np.clip(np.rint(rest[:, j] / scale), lowest, highest)
        error = (rest[:, j] - integers[:, column] * scale) / factor[j, j]
        rest[:, j + 1 :] -= np.outer(error, factor[j, j + 1 :])
    return integers


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_rounds_columns_as_published(bits) -> None:
    weight, moments = problem()
    order = np.argsort(-np.diag(moments), kind="stable").astype(np.int32)
    factor = np.linalg.cholesky(np.linalg.inv(moments[order][:, order])).T.astype(np.float32)
    found = gptq(weight, factor, np.ones(96, np.float32), bits, 32, order=order)
    scales = found.scales.astype(np.float32)
    integers = dequantize_blocks(found, bits) / np.repeat(scales, 32, 1)
    expected = reference_gptq(weight, moments, scales, bits, order)
    # float32 against float64: a quotient on the edge of two integers may fall to either side, and what follows with it
    same = (np.rint(integers) == expected).all(1)
    assert same.mean() > 0.8


def test_gptq_rounds_columns_between_minima() -> None:
    weight, moments = problem()
    order = np.argsort(-np.diag(moments), kind="stable").astype(np.int32)
    factor = np.linalg.cholesky(np.linalg.inv(moments[order][:, order])).T
    found = gptq(weight, factor.astype(np.float32), np.ones(96, np.float32), 4, 32, order=order, counted=True)
    assert isinstance(found, CountedBlocks)
    scales, minima = (np.repeat(part.astype(np.float64), 32, 1)[:, order] for part in found[1:])
    rest, made = weight[:, order].astype(np.float64), np.zeros(weight.shape)
    for j, column in enumerate(order):
        integers = np.clip(np.rint((rest[:, j] - minima[:, j]) / scales[:, j]), 0, 15)
        made[:, column] = integers * scales[:, j] + minima[:, j]
        rest[:, j + 1 :] -= np.outer((rest[:, j] - made[:, column]) / factor[j, j], factor[j, j + 1 :])
    # float32 against float64: a quotient on the edge of two integers may fall to either side, and what follows with it
    assert np.isclose(dequantize_blocks(found, 4), made, rtol=1e-5, atol=1e-5).all(1).mean() > 0.8


def test_gptq_errs_less_on_its_inputs_than_rounding() -> None:
    weight, moments = problem()
    factor = np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)
    chosen = dequantize_blocks(gptq(weight, factor, np.ones(96, np.float32), 4, 32), 4)
    plain = dequantize_blocks(quantize_blocks(weight, 4, 32, "float16", search=True), 4)

    def error(matrix):
        return np.einsum("nk,kl,nl->n", matrix - weight, moments, matrix - weight).sum()

    assert error(chosen) < error(plain)


def test_gptq_gives_the_same_bytes_on_any_number_of_threads() -> None:
    weight, moments = problem(rows=100)
    factor = np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)
    one, other = (gptq(weight, factor, np.ones(96, np.float32), 4, 32, threads=count) for count in (1, 3))
    assert (one.values == other.values).all() and (one.scales.view("u2") == other.scales.view("u2")).all()


def test_gptq_refuses_weights_that_are_not_finite() -> None:
    weight, moments = problem()
    weight[3, 40] = np.inf
    factor = np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)
    with pytest.raises(ValueError, match="scale"):
        gptq(weight, factor, np.ones(96, np.float32), 4, 32)
