"""AWQ layers packed by hand, against the rule of the format element by element."""

import numpy as np
import pytest

from trtllm.checkpoints.stored import Offset, dequantized
from trtllm.errors import BadInputError, UnsupportedModelError

CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
INPUTS, OUTPUTS, GROUP = 64, 24, 32
NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]


def packed(numbers):
    """[rows, columns] of 4 bits: nibble i of word c holds column 8 c + NIBBLES[i]."""
    words = np.zeros((len(numbers), numbers.shape[1] // 8), np.int64)
    for row, column_numbers in enumerate(numbers):
        for word in range(words.shape[1]):
            for nibble, column in enumerate(NIBBLES):
                words[row, word] |= int(column_numbers[8 * word + column]) << (4 * nibble)
    return words.astype(np.uint32).view(np.int32)


def made(seed=0):
    random = np.random.default_rng(seed)
    integers = random.integers(0, 16, (INPUTS, OUTPUTS))
    zeros = random.integers(0, 16, (INPUTS // GROUP, OUTPUTS))
    scales = random.normal(size=zeros.shape).astype(np.float16)
    arrays = {"qweight": packed(integers), "qzeros": packed(zeros), "scales": scales}
    expected = np.zeros((OUTPUTS, INPUTS), np.float32)
    for k in range(INPUTS):
        for n in range(OUTPUTS):
            expected[n, k] = np.float32(integers[k, n] - zeros[k // GROUP, n]) * np.float32(scales[k // GROUP, n])
    return arrays, expected


def test_every_element_is_integer_less_zero_point_times_scale(layer):
    arrays, expected = made()
    weight = layer("awq", CONFIG, arrays)
    np.testing.assert_array_equal(weight.read(), expected)
    np.testing.assert_array_equal(weight.read(3, 21), expected[3:21])


def test_the_integer_form_is_exact(layer):
    arrays, expected = made(1)
    weight = layer("awq", CONFIG, arrays)
    form = weight.stored.integers
    assert (form.bits, form.group_size, form.offset, form.is_exact) == (4, GROUP, Offset.ZERO_POINT, True)
    values = weight.blocks.values(0, OUTPUTS)
    assert values.min() >= 0 and values.max() <= 15
    np.testing.assert_array_equal(dequantized(weight.blocks, form, 7, 20), expected[7:20])


def test_a_group_size_of_minus_one_is_the_whole_row(layer):
    arrays, _ = made()
    arrays = arrays | {"qzeros": arrays["qzeros"][:1], "scales": arrays["scales"][:1]}
    assert layer("awq", CONFIG | {"group_size": -1}, arrays).stored.integers.group_size == INPUTS


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin", "ipex"])
def test_other_packings_are_refused_by_name(layer, version):
    with pytest.raises(UnsupportedModelError, match=f"version '{version}'"):
        layer("awq", CONFIG | {"version": version}, made()[0])


def test_other_widths_are_refused(layer):
    with pytest.raises(UnsupportedModelError, match="8 bits"):
        layer("awq", CONFIG | {"bits": 8}, made()[0])


@pytest.mark.parametrize("lost", ["qzeros", "scales"])
def test_a_missing_part_is_named(layer, lost):
    arrays = {ending: array for ending, array in made()[0].items() if ending != lost}
    with pytest.raises(BadInputError, match=f"no 'layer.{lost}'"):
        layer("awq", CONFIG, arrays)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("scales", lambda a: a[:, :-1]),
        ("scales", lambda a: a.repeat(2, axis=0)),
        ("scales", lambda a: a.astype(np.int32)),
        ("qzeros", lambda a: a[:1]),
        ("qzeros", lambda a: a.astype(np.int64)),
        ("qweight", lambda a: a[:-1]),
        ("qweight", lambda a: a.reshape(-1)),
        ("qweight", lambda a: a.astype(np.float32)),
        ("qweight", lambda a: a[:, :0]),
    ],
)
def test_parts_that_do_not_fit_are_refused(layer, part, change):
    arrays, _ = made()
    with pytest.raises(BadInputError) as caught:
        layer("awq", CONFIG, arrays | {part: change(arrays[part])})
    assert "layer" in caught.value.what and len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("size", [48, 0, -2, "32", None, True])
def test_a_group_size_that_does_not_divide_is_refused(layer, size):
    with pytest.raises(BadInputError, match="group_size"):
        layer("awq", CONFIG | {"group_size": size}, made()[0])


def test_a_config_without_such_tensors_is_refused(layer):
    with pytest.raises(BadInputError, match="no tensor is stored so"):
        layer("awq", CONFIG, {"weight": np.zeros((4, 4), np.float32)})
