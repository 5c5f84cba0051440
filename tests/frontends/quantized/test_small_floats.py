"""FP8 in blocks and ModelOpt's layers, packed by hand, against the rules of the formats element by element."""

import ml_dtypes
import numpy as np
import pytest

from trtllm.checkpoints.stored import dequantized
from trtllm.errors import BadInputError, UnsupportedModelError

E4M3 = ml_dtypes.float8_e4m3fn
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
ROWS, COLUMNS = 40, 96


def random_e4m3(*shape, seed=0):
    """Every finite code."""
    codes = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    return codes.view(E4M3)


@pytest.mark.parametrize("block", [(16, 32), (32, 32), (128, 128), (40, 96), (7, 13)])
def test_fp8_blocks_multiply_by_what_is_called_inverse(layer, block):
    weight = random_e4m3(ROWS, COLUMNS)
    height, width = -(-ROWS // block[0]), -(-COLUMNS // block[1])
    scales = np.random.default_rng(1).normal(size=(height, width)).astype(np.float32)
    read = layer("fp8", {"weight_block_size": list(block)}, {"weight": weight, "weight_scale_inv": scales}).read
    expected = np.zeros((ROWS, COLUMNS), np.float32)
    for n in range(ROWS):
        for k in range(COLUMNS):
            expected[n, k] = np.float32(weight[n, k]) * scales[n // block[0], k // block[1]]
    np.testing.assert_array_equal(read(), expected)
    np.testing.assert_array_equal(read(11, 37), expected[11:37])


@pytest.mark.parametrize("shape", [(), (1,), (ROWS, 1)])
def test_fp8_without_blocks_has_one_scale_or_one_an_output(layer, shape):
    weight = random_e4m3(ROWS, COLUMNS)
    scales = np.asarray(np.random.default_rng(1).normal(size=shape), np.float32)
    read = layer("fp8", {}, {"weight": weight, "weight_scale_inv": scales}).read
    np.testing.assert_array_equal(read(3, 9), (weight.astype(np.float32) * scales.reshape(-1, 1))[3:9])


@pytest.mark.parametrize("block", [[128], "128", [0, 128], [128, 128.0]])
def test_a_damaged_block_size_is_refused(layer, block):
    arrays = {"weight": random_e4m3(ROWS, COLUMNS), "weight_scale_inv": np.ones((1, 1), np.float32)}
    with pytest.raises(BadInputError, match="weight_block_size"):
        layer("fp8", {"weight_block_size": block}, arrays)


def test_fp8_scales_of_other_blocks_are_refused(layer):
    arrays = {"weight": random_e4m3(ROWS, COLUMNS), "weight_scale_inv": np.ones((2, 2), np.float32)}
    with pytest.raises(BadInputError, match="does not fit"):
        layer("fp8", {"weight_block_size": [128, 128]}, arrays)
    with pytest.raises(BadInputError, match=r"no 'layer\.weight_scale_inv'"):
        layer("fp8", {"weight_block_size": [128, 128]}, {"weight": arrays["weight"]})


def test_modelopt_fp8_has_one_scale(layer):
    weight = random_e4m3(ROWS, COLUMNS)
    arrays = {"weight": weight, "weight_scale": np.float32(0.37).reshape(()), "input_scale": np.ones((), np.float32)}
    stored = layer("modelopt", {"quant_algo": "FP8"}, arrays)
    np.testing.assert_array_equal(stored.read(), weight.astype(np.float32) * np.float32(0.37))
    assert stored.stored.integers is None and not stored.stored.coarse


def test_modelopt_nvfp4_multiplies_by_both_scales(layer):
    random = np.random.default_rng(3)
    codes = random.integers(0, 16, (ROWS, COLUMNS)).astype(np.uint8)
    scales, whole = random_e4m3(ROWS, COLUMNS // 16, seed=4), np.float32(0.0123)
    arrays = {
        "weight": codes[:, 0::2] | (codes[:, 1::2] << 4),
        "weight_scale": scales,
        "weight_scale_2": whole.reshape(()),
    }
    stored = layer("modelopt", {"quant_algo": "NVFP4"}, arrays)
    expected = np.zeros((ROWS, COLUMNS), np.float32)
    for n in range(ROWS):
        for k in range(COLUMNS):
            element = E2M1[codes[n, k] & 7] * (-1 if codes[n, k] & 8 else 1)
            expected[n, k] = np.float32(element) * (np.float32(scales[n, k // 16]) * whole)
    np.testing.assert_array_equal(stored.read(), expected)
    assert stored.stored.coarse


@pytest.mark.parametrize("scaled", [False, True])
def test_modelopt_awq_packs_two_outputs_a_byte(layer, scaled):
    random = np.random.default_rng(5)
    integers = random.integers(-8, 8, (ROWS, COLUMNS))
    scales = random.normal(size=(ROWS, COLUMNS // 32)).astype(np.float16)
    columns = random.uniform(0.5, 2, COLUMNS).astype(np.float16)
    arrays = {
        "weight": ((integers[0::2] & 15) | ((integers[1::2] & 15) << 4)).astype(np.uint8),
        "weight_scale": scales,
    }
    if scaled:
        arrays["pre_quant_scale"] = columns
    stored = layer("modelopt", {"quant_algo": "W4A16_AWQ"}, arrays)
    expected = np.zeros((ROWS, COLUMNS), np.float32)
    for n in range(ROWS):
        for k in range(COLUMNS):
            expected[n, k] = np.float32(integers[n, k]) * np.float32(scales[n, k // 32])
    if scaled:
        assert stored.stored.integers is None and "scaled inputs" in stored.stored.method
        np.testing.assert_array_equal(stored.read(), expected * columns.astype(np.float32))
        return
    np.testing.assert_array_equal(stored.read(), expected)
    np.testing.assert_array_equal(dequantized(stored.blocks, stored.stored.integers, 3, 8), expected[3:8])


def test_modelopt_mixes_methods_by_layer(layer):
    arrays = {"weight": random_e4m3(ROWS, COLUMNS), "weight_scale": np.ones((), np.float32)}
    assert layer("modelopt", {"quant_algo": "MIXED_PRECISION"}, arrays).stored.method == "ModelOpt FP8"


@pytest.mark.parametrize("algorithm", ["W8A8_SQ_PER_CHANNEL", None, "FP8_PB_WO"])
def test_other_algorithms_of_modelopt_are_refused(layer, algorithm):
    with pytest.raises(UnsupportedModelError, match=f"quant_algo {algorithm}"):
        layer("modelopt", {"quant_algo": algorithm}, {"weight": np.zeros((2, 2), np.float32)})


@pytest.mark.parametrize(
    ("part", "array"),
    [
        ("weight_scale", np.ones((ROWS, 5), E4M3)),
        ("weight_scale_2", np.ones((2,), np.float32)),
        ("weight", np.ones((ROWS, 7), np.uint8)),
        ("weight", np.ones((ROWS, COLUMNS), np.int32)),
    ],
)
def test_modelopt_parts_that_do_not_fit_are_refused(layer, part, array):
    arrays = {
        "weight": np.ones((ROWS, COLUMNS // 2), np.uint8),
        "weight_scale": np.ones((ROWS, COLUMNS // 16), E4M3),
        "weight_scale_2": np.ones((), np.float32),
    }
    layer("modelopt", {"quant_algo": "NVFP4"}, arrays)
    with pytest.raises(BadInputError) as caught:
        layer("modelopt", {"quant_algo": "NVFP4"}, arrays | {part: array})
    assert len(str(caught.value).splitlines()) == 2
