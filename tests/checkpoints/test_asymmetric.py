"""Weights with minima and zero points: from what a file holds to the kernel's tiles, and what these multiply to."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from trtllm.checkpoints.checkpoint import TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import (
    AsymmetricMinima,
    AsymmetricScales,
    AsymmetricValues,
    KeptOffsets,
    KeptScales,
    KeptValues,
    Source,
    TiledScales,
    TiledValues,
    recipe_from_json,
)
from trtllm.checkpoints.stored import IntegerBlocks, IntegerForm, Offset, QuantizedTensor, StoredQuantization
from trtllm.dtypes import DType
from trtllm.errors import BadInputError
from trtllm.runtime.sessions.onnxruntime_library import register_operators

OUTPUTS, INPUTS = 40, 96
NAME = "layer.weight"
ASYMMETRIC = [
    IntegerForm(bits, group, offset)
    for bits in (4, 8)
    for group in (32, 96)
    for offset in (Offset.MINIMUM, Offset.ZERO_POINT)
]
NUMBERS = {Offset.NONE: 0, Offset.MINIMUM: 1, Offset.ZERO_POINT: 2}


def weight_of(form, *, scale=None):
    """A random weight of that form."""
    random = np.random.default_rng(form.group_size + form.bits)
    lowest, highest = (-128, 127) if form.bits == 8 else (0, 15)
    values = random.integers(lowest, highest + 1, (OUTPUTS, INPUTS)).astype(np.int8)
    shape = (OUTPUTS, INPUTS // form.group_size)
    scales, minima = random.normal(size=(2, *shape)).astype(np.float16).astype(np.float32)
    zeros = random.integers(lowest, highest + 2, shape).astype(np.float32)
    offsets = {Offset.MINIMUM: minima, Offset.ZERO_POINT: zeros}.get(form.offset)
    scales = scales if scale is None else np.full_like(scales, scale)
    blocks = IntegerBlocks(
        lambda start, stop: values[start:stop],
        lambda start, stop: scales[start:stop],
        None if offsets is None else lambda start, stop: offsets[start:stop],
    )
    spec = TensorSpec(NAME, (OUTPUTS, INPUTS), DType.FLOAT32)
    return QuantizedTensor(spec, StoredQuantization("a test", form), blocks)


def tiles_of(tensor, bits, offset, **reading):
    """Values, scales and offsets in tiles, each read in chunks."""
    source = Source.of(tensor.spec)
    recipes = [
        TiledValues(KeptValues(source, bits, offset.value)),
        TiledScales(KeptScales(source, 32)),
        TiledScales(KeptOffsets(source, bits, offset.value, 32)),
    ]
    reader = RecipeReader({NAME: tensor}, **reading)
    return [
        np.concatenate([np.asarray(piece) for piece in reader.chunks(recipe_from_json(recipe.to_json()))])
        for recipe in recipes
    ]


def elements_of(tiles, bits, offset):
    """float64 [N, K] of the tiles, element by element as runtime/native/quantized_linear.h lays them out."""
    values, scales, offsets = tiles
    result = np.zeros((OUTPUTS, INPUTS))
    for n in range(OUTPUTS):
        for k in range(INPUTS):
            tile, block, column, place = n // 16, k // 32, n % 16, k % 32
            within = place if bits == 8 else place % 16
            byte = int(values[tile, block, (within // 4 * 16 + column) * 4 + within % 4])
            stored = byte - 128 if bits == 8 else byte & 15 if place < 16 else byte >> 4
            scale, added = float(scales[tile, block, column]), float(offsets[tile, block, column])
            is_minimum = offset is Offset.MINIMUM
            result[n, k] = scale * stored + added if is_minimum else scale * (stored - added)
    return result


def kernel_product(tiles, bits, offset, x):
    """The rows of `x` times the tiled weight, by the engine's operator."""
    inputs = ["x", "values", "scales", "", "offsets"]
    attributes = {"N": OUTPUTS, "K": INPUTS, "bits": bits, "gate": 0, "offset": NUMBERS[offset]}
    node = helper.make_node("QuantizedLinear", inputs, ["y"], domain="trtllm.cpu", **attributes)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUTPUTS])],
        [
            onnx.numpy_helper.from_array(array, name)
            for name, array in zip(inputs[1:3] + inputs[4:], tiles, strict=True)
        ],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("trtllm.cpu", 1)]
    options = onnxruntime.SessionOptions()
    register_operators(options)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


@pytest.mark.parametrize("form", ASYMMETRIC, ids=str)
@pytest.mark.parametrize("chunk_bytes", [1, 5000, 1 << 20])
def test_tiles_hold_the_weight_to_the_last_bit(form, chunk_bytes):
    tensor = weight_of(form)
    tiles = tiles_of(tensor, form.bits, form.offset, chunk_bytes=chunk_bytes)
    # the tiles in double precision round to the float32 element, whose own arithmetic rounds once at most
    np.testing.assert_array_equal(elements_of(tiles, form.bits, form.offset).astype(np.float32), tensor.read())


@pytest.mark.parametrize("form", [form for form in ASYMMETRIC if form.bits == 4], ids=str)
def test_4_bits_in_a_wider_form_are_the_same_weight(form):
    """As where one part of a packed weight has 8 bits."""
    tensor = weight_of(form)
    tiles = tiles_of(tensor, 8, form.offset)
    np.testing.assert_array_equal(elements_of(tiles, 8, form.offset).astype(np.float32), tensor.read())


@pytest.mark.parametrize("offset", [Offset.MINIMUM, Offset.ZERO_POINT])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_part_without_offsets_gets_those_that_change_nothing(bits, offset):
    form = IntegerForm(8, 32)
    tensor = weight_of(form)
    if bits == 4:
        values = (tensor.blocks.values(0, OUTPUTS).astype(np.int16) // 16).astype(np.int8)  # -8 .. 7
        blocks = IntegerBlocks(lambda start, stop: values[start:stop], tensor.blocks.scales)
        tensor = QuantizedTensor(tensor.spec, StoredQuantization("a test", IntegerForm(4, 32)), blocks)
    np.testing.assert_array_equal(elements_of(tiles_of(tensor, bits, offset), bits, offset), tensor.read())


@pytest.mark.parametrize("form", ASYMMETRIC, ids=str)
@pytest.mark.parametrize("rows", [1, 8])
def test_the_kernel_multiplies_by_the_weight(form, rows):
    tensor = weight_of(form)
    x = np.random.default_rng(rows).normal(size=(rows, INPUTS)).astype(np.float32)
    weight = tensor.read().astype(np.float64)
    largest = np.abs(x).reshape(rows, -1, 32).max(axis=2).repeat(32, axis=1)
    # an activation is off by half a step of 1/127 of its block's largest
    bound = 1.001 * (largest / 254) @ np.abs(weight).T
    y = kernel_product(tiles_of(tensor, form.bits, form.offset), form.bits, form.offset, x)
    assert (np.abs(y - x @ weight.T) <= bound).all()


@pytest.mark.parametrize("form", ASYMMETRIC, ids=str)
def test_activations_that_need_no_rounding_give_exact_products(form):
    """Whole activations up to 127 in each block: what is left is the float32 sum of three blocks."""
    tensor = weight_of(form)
    x = np.random.default_rng(9).integers(-127, 128, (3, INPUTS)).astype(np.float32)
    x[:, ::32] = 127
    weight = tensor.read().astype(np.float64)
    y = kernel_product(tiles_of(tensor, form.bits, form.offset), form.bits, form.offset, x)
    terms = np.abs(x) @ (np.abs(weight) + np.abs(tensor.blocks.scales(0, OUTPUTS)).max() * 256).T
    assert (np.abs(y - x @ weight.T) <= terms * 2.0**-24 * 8).all()  # eight roundings of partial sums at most


@pytest.mark.parametrize(
    ("form", "bits", "offset"),
    [
        (IntegerForm(8, 32, Offset.MINIMUM), 4, Offset.MINIMUM),
        (IntegerForm(4, 32, Offset.MINIMUM), 4, Offset.ZERO_POINT),
        (IntegerForm(4, 32, Offset.ZERO_POINT), 8, Offset.MINIMUM),
        (IntegerForm(4, 32, Offset.ZERO_POINT), 4, Offset.NONE),
    ],
    ids=str,
)
def test_a_form_that_the_engine_does_not_hold_is_refused_in_two_lines(form, bits, offset):
    """A refit meets checkpoints of other quantizations than the build did."""
    reader = RecipeReader({NAME: weight_of(form)})
    with pytest.raises(BadInputError, match=f"'{NAME}' is stored as a test") as caught:
        reader.read(KeptValues(Source(NAME, (OUTPUTS, INPUTS), DType.FLOAT32), bits, offset.value))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("scale", [1e6, np.inf, np.nan])
def test_a_scale_that_float16_does_not_hold_is_an_error(scale):
    tensor = weight_of(IntegerForm(4, 32, Offset.MINIMUM, DType.FLOAT32), scale=scale)
    with pytest.raises(BadInputError, match="a scale that float16 cannot hold") as caught:
        RecipeReader({NAME: tensor}).read(KeptScales(Source.of(tensor.spec), 32))
    assert len(str(caught.value).splitlines()) == 2


class Floats:
    """A float32 tensor that is rounded with minima."""

    def __init__(self, array):
        self.array = array.astype(np.float32)
        self.spec = TensorSpec(NAME, array.shape, DType.FLOAT32)

    def read(self, start=0, stop=None):
        return self.array[start:stop]


def rounded(array):
    """What the recipes of a rounding with minima make of a matrix, in float64."""
    reader, source = RecipeReader({NAME: Floats(array)}), Source(NAME, array.shape, DType.FLOAT32)
    packed = reader.read(AsymmetricValues(source, 32))
    integers = np.stack([packed & 15, packed >> 4], axis=-1).reshape(array.shape) ^ 8
    scales = reader.read(AsymmetricScales(source, 32)).astype(np.float64).repeat(32, axis=1)
    minima = reader.read(AsymmetricMinima(source, 32)).astype(np.float64).repeat(32, axis=1)
    return scales * integers + minima, scales


def test_rounding_with_minima_is_off_by_half_a_step():
    array = np.random.default_rng(2).normal(size=(OUTPUTS, INPUTS)) * 10 + 3
    made, scales = rounded(array)
    # half a step; and where the float16 scale fell short, its 15th part of the range: 15 steps of 2^-11 of a step
    slack = 15 * 2.0**-11 * scales + np.abs(array).max() * 2.0**-11
    assert (np.abs(made - array.astype(np.float32)) <= scales / 2 + slack).all()


def test_a_block_of_one_value_is_that_value():
    made, scales = rounded(np.full((16, 32), -2.5))
    assert (made == -2.5).all() and (scales == 0).all()


@pytest.mark.parametrize(("element", "words"), [(np.nan, "NaN or infinity"), (np.inf, "NaN"), (1e6, "too large")])
def test_what_cannot_be_rounded_with_minima_is_named(element, words):
    array = np.zeros((16, 32))
    array[3, 5] = element
    with pytest.raises(BadInputError, match=words) as caught:
        rounded(array)
    assert NAME in str(caught.value) and len(str(caught.value).splitlines()) == 2
