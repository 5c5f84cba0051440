"""GPTQ layers packed by hand in both formats and every width, against the rule of the format element by element."""

import numpy as np
import pytest

from trtllm.checkpoints.stored import Offset, dequantized
from trtllm.errors import BadInputError, UnsupportedModelError

INPUTS, OUTPUTS, GROUP = 96, 32, 32


def packed_bits(numbers, bits):
    """Numbers of `bits` one after the other from the low bit of the first int32 word on."""
    stream = 0
    for index, number in enumerate(numbers):
        stream |= int(number) << (index * bits)
    count = len(numbers) * bits // 32
    return np.array([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(count)], np.uint32).view(np.int32)


def config(bits, **other):
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, **other}


def made(bits, *, symmetric=False, second_format=False, order=None, seed=0):
    """The parts of a layer and its weight; zero points are at least 1, which format 1 stores as 0."""
    random = np.random.default_rng(seed)
    integers = random.integers(0, 1 << bits, (INPUTS, OUTPUTS))
    zeros = random.integers(1, 1 << bits, (INPUTS // GROUP, OUTPUTS))
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    scales = random.normal(size=zeros.shape).astype(np.float16)
    groups = np.arange(INPUTS) // GROUP if order is None else order
    arrays = {
        "qweight": np.stack([packed_bits(column, bits) for column in integers.T], axis=1),
        "qzeros": np.stack([packed_bits(row - (not second_format), bits) for row in zeros]),
        "scales": scales,
        "g_idx": groups.astype(np.int32),
    }
    expected = np.zeros((OUTPUTS, INPUTS), np.float32)
    for k in range(INPUTS):
        for n in range(OUTPUTS):
            expected[n, k] = np.float32(integers[k, n] - zeros[groups[k], n]) * np.float32(scales[groups[k], n])
    return arrays, expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("second_format", [True, False])
def test_every_element_is_integer_less_zero_point_times_scale(layer, bits, symmetric, second_format):
    arrays, expected = made(bits, symmetric=symmetric, second_format=second_format)
    stated = {"checkpoint_format": "gptq_v2"} if second_format else {}
    weight = layer("gptq", config(bits, sym=symmetric, **stated), arrays)
    np.testing.assert_array_equal(weight.read(), expected)
    form = weight.stored.integers
    assert form.offset is (Offset.NONE if symmetric else Offset.ZERO_POINT)
    assert form.bits == (8 if bits == 8 else 4)
    np.testing.assert_array_equal(dequantized(weight.blocks, form, 5, 17), expected[5:17])
    values = weight.blocks.values(0, OUTPUTS)
    lowest, highest = (-128, 127) if bits == 8 else (-8, 7) if symmetric else (0, 15)
    assert values.dtype == np.int8 and lowest <= values.min() and values.max() <= highest


def test_the_formats_differ_by_one_step(layer):
    arrays, expected = made(4)
    later = layer("gptq", config(4, checkpoint_format="gptq_v2"), arrays).read()
    scales = arrays["scales"].astype(np.float32).T.repeat(GROUP, axis=1)
    np.testing.assert_allclose(later - expected, scales, atol=2.0**-19)  # products below 64 are exact to 2^-19


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_activation_order_has_no_integer_form_but_is_read(layer, bits):
    order = np.random.default_rng(5).permutation(np.arange(INPUTS) // GROUP)
    arrays, expected = made(bits, order=order)
    weight = layer("gptq", config(bits, desc_act=True), arrays)
    assert weight.stored.integers is None and "activation order" in weight.stored.method
    assert weight.stored.coarse == (bits < 8)
    np.testing.assert_array_equal(weight.read(2, 19), expected[2:19])


def test_activation_order_that_is_in_order_keeps_its_integers(layer):
    weight = layer("gptq", config(4, desc_act=True), made(4)[0])
    assert weight.stored.integers is not None


def test_groups_in_order_need_no_index(layer):
    arrays, expected = made(4)
    del arrays["g_idx"]
    np.testing.assert_array_equal(layer("gptq", config(4), arrays).read(), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_0_in_the_first_format_borrow_from_their_neighbours(layer, bits):
    """As the library subtracts and adds: ones at every number's place, from and to whole words."""
    arrays, _ = made(bits, second_format=True, seed=4)
    zeros = np.random.default_rng(4).integers(0, 1 << bits, (INPUTS // GROUP, OUTPUTS))
    zeros[:, ::3] = 0
    arrays["qzeros"] = np.stack([packed_bits(row, bits) for row in zeros])
    expected = layer("gptq", config(bits, checkpoint_format="gptq_v2"), arrays).read()
    ones = packed_bits(np.ones(32 // bits, int), bits)
    first = arrays | {"qzeros": (arrays["qzeros"].view(np.uint32) - ones.view(np.uint32)).view(np.int32)}
    weight = layer("gptq", config(bits), first)
    np.testing.assert_array_equal(weight.read(), expected)
    shift = 128 if bits == 8 else 0
    np.testing.assert_array_equal(weight.blocks.offsets(0, OUTPUTS) + shift, zeros.T)


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_other_widths_are_refused(layer, bits):
    with pytest.raises(UnsupportedModelError, match=f"{bits} bits"):
        layer("gptq", config(bits), made(4)[0])


@pytest.mark.parametrize("layout", ["marlin", "gptq_v3", "bitblas"])
def test_other_formats_are_refused_by_name(layer, layout):
    with pytest.raises(UnsupportedModelError, match=f"checkpoint_format '{layout}'"):
        layer("gptq", config(4, checkpoint_format=layout), made(4)[0])


@pytest.mark.parametrize("lost", ["qzeros", "scales"])
def test_a_missing_part_is_named(layer, lost):
    arrays = {ending: array for ending, array in made(4)[0].items() if ending != lost}
    with pytest.raises(BadInputError, match=f"no 'layer.{lost}'"):
        layer("gptq", config(4), arrays)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("qweight", lambda a: a[:-1]),
        ("qweight", lambda a: a[:, :-1]),
        ("qzeros", lambda a: a[:-1]),
        ("scales", lambda a: a[:, ::2]),
        ("g_idx", lambda a: a[:-1]),
        ("g_idx", lambda a: a + 1),
        ("g_idx", lambda a: a - 1),
        ("g_idx", lambda a: a.astype(np.float32)),
    ],
)
def test_parts_that_do_not_fit_are_refused(layer, part, change):
    arrays, _ = made(4)
    with pytest.raises(BadInputError) as caught:
        layer("gptq", config(4), arrays | {part: change(arrays[part])})
    assert "layer" in caught.value.what and len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("group", "named"), [(3, 3), (-1, -1), (1 << 30, 1 << 30)])
def test_a_group_that_does_not_exist_is_named(layer, group, named):
    arrays, _ = made(4)
    arrays["g_idx"][17] = group
    with pytest.raises(BadInputError, match=f"'layer.g_idx' names group {named} of 3"):
        layer("gptq", config(4), arrays)


@pytest.mark.parametrize("size", [64, 36, 0, -2, "32", None, True])
def test_a_group_size_that_does_not_divide_is_refused(layer, size):
    with pytest.raises(BadInputError, match="group_size") as caught:
        layer("gptq", config(4) | {"group_size": size}, made(4)[0])
    assert len(str(caught.value).splitlines()) == 2


def test_a_config_of_another_width_is_refused(layer):
    for bits in (2, 3, 8):
        with pytest.raises(BadInputError):
            layer("gptq", config(bits), made(4)[0])
