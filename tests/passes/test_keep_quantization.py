"""What a checkpoint stores quantized is what the graph computes with, in every form and lowering."""

import numpy as np
import pytest

from trtllm.checkpoints.checkpoint import TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Concat, Source, recipe_from_json
from trtllm.checkpoints.stored import (
    IntegerBlocks,
    IntegerForm,
    Offset,
    QuantizedTensor,
    StoredQuantization,
    stored_quantizations,
)
from trtllm.compiler.ir.verifier import verify
from trtllm.compiler.ir.weights import Weight
from trtllm.dtypes import DType
from trtllm.errors import BadInputError
from trtllm.passes.base import PassContext
from trtllm.passes.cleanup import RemoveDeadCode
from trtllm.passes.keep_quantization import KeepQuantization
from trtllm.passes.lower_linear import LowerLinear

OUTPUTS, INPUTS = 48, 128
FEED = {"x": np.random.default_rng(3).normal(size=(2, 3, INPUTS)).astype(np.float32)}
OWN = "trtllm.cpu::QuantizedLinear"
FORMS = [
    IntegerForm(bits, group, offset)
    for bits in (4, 8)
    for group in (32, 64, 128)
    for offset in (Offset.NONE, Offset.MINIMUM, Offset.ZERO_POINT)
]


def stored_tensor(name, form, seed=0, outputs=OUTPUTS, inputs=INPUTS, method="a test"):
    """A random weight of that form; its scales and minima are float16 numbers, its zero points whole ones."""
    random = np.random.default_rng(seed)
    lowest, highest = (-128, 127) if form.bits == 8 else (-8, 7) if form.offset is Offset.NONE else (0, 15)
    values = random.integers(lowest, highest + 1, (outputs, inputs)).astype(np.int8)
    shape = (outputs, inputs // form.group_size)
    scales = random.normal(size=shape).astype(np.float16).astype(np.float32)
    offsets = random.normal(size=shape).astype(np.float16).astype(np.float32)
    if form.offset is Offset.ZERO_POINT:
        offsets = random.integers(lowest, highest + 2, shape).astype(np.float32)
    blocks = IntegerBlocks(
        lambda start, stop: values[start:stop],
        lambda start, stop: scales[start:stop],
        None if form.offset is Offset.NONE else lambda start, stop: offsets[start:stop],
    )
    return QuantizedTensor(TensorSpec(name, (outputs, inputs), DType.FLOAT32), StoredQuantization(method, form), blocks)


def coarse_tensor(name, seed=0):
    array = np.random.default_rng(seed).normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
    spec = TensorSpec(name, array.shape, DType.FLOAT32)
    stored = StoredQuantization("coarse", None, coarse=True)
    return QuantizedTensor(spec, stored, None, lambda start, stop: array[start:stop].copy())


def network_of(small, *tensors, op="Linear"):
    """One product for each tensor, of the same input."""
    b = small.b
    x = b.input("x", DType.FLOAT32, ("batch", "sequence", INPUTS))
    for index, tensor in enumerate(tensors):
        small.tensors[tensor.spec.name] = tensor
        weight = b.weight(tensor.spec.name, Source.of(tensor.spec))
        b.output(b.dialect(op, [x, weight], name=tensor.spec.name.removesuffix(".weight")), f"y{index}")
    return small.finish()


def context_of(context_for, small, *operators, **options):
    context = context_for(*operators, packed=True, **options)
    return PassContext(context.build, context.capabilities, stored=stored_quantizations(small.tensors))


def weights_of(network):
    return {name: v.const_value for name, v in network.graph.initializers.items() if isinstance(v.const_value, Weight)}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("op", ["Linear", "LogitsHead"])
def test_the_graph_computes_with_the_stored_weights(small, context_for, evaluate, form, op):
    tensor = stored_tensor("proj.weight", form)
    network = network_of(small, tensor, op=op)
    context = context_of(context_for, small, OWN)
    assert KeepQuantization().run(network, context) == 1
    verify(network.graph, after="keep-quantization")
    RemoveDeadCode().run(network, context)
    exact = FEED["x"].astype(np.float64) @ tensor.read().astype(np.float64).T
    # float32 sums of 128 products, one rounding each of at most the sum of magnitudes; weights are exact but for one
    magnitude = np.abs(FEED["x"]) @ np.abs(tensor.read()).T
    assert (np.abs(evaluate(small, network, FEED)[0] - exact) <= magnitude * 6e-8 * (INPUTS + 2)).all()
    assert context.notes == ["a test: 1 weight kept bit for bit"]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_recipes_give_the_stored_numbers(small, context_for, form):
    tensor = stored_tensor("proj.weight", form)
    network = network_of(small, tensor)
    KeepQuantization().run(network, context_of(context_for, small, OWN))
    reader = RecipeReader(small.tensors)
    weights = weights_of(network)
    repeats = form.group_size // 32
    scales = reader.read(weights["proj.weight_scales"].recipe)
    np.testing.assert_array_equal(scales, tensor.blocks.scales(0, OUTPUTS).repeat(repeats, axis=1))
    if form.offset is not Offset.NONE:
        offsets = reader.read(weights["proj.weight_offsets"].recipe)
        np.testing.assert_array_equal(offsets, tensor.blocks.offsets(0, OUTPUTS).repeat(repeats, axis=1))
    for weight in weights.values():
        assert recipe_from_json(weight.recipe.to_json()) == weight.recipe
        pieces = b"".join(
            np.ascontiguousarray(piece).tobytes()
            for piece in RecipeReader(small.tensors, chunk_bytes=999).chunks(weight.recipe)
        )
        assert pieces == reader.read(weight.recipe).tobytes()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_kernel_agrees_up_to_its_rounded_activations(small, context_for, evaluate, operators, form):
    tensor = stored_tensor("proj.weight", form)
    network = network_of(small, tensor)
    context = context_of(context_for, small, OWN)
    KeepQuantization().run(network, context)
    LowerLinear().run(network, context)
    RemoveDeadCode().run(network, context)
    assert operators(network) == ["QuantizedLinear"]
    exact = FEED["x"] @ tensor.read().T
    # each activation is off by at most half a step, 1/254 of the largest of its block
    largest = np.abs(FEED["x"]).reshape(2, 3, -1, 32).max(axis=3).repeat(32, axis=2)
    bound = (largest / 254) @ np.abs(tensor.read()).T
    assert (np.abs(evaluate(small, network, FEED)[0] - exact) <= bound * 1.001).all()


def test_a_symmetric_form_has_a_product_without_the_kernel_and_one_with_offsets_does_not(
    small, context_for, evaluate, operators
):
    network = network_of(
        small,
        stored_tensor("a.weight", IntegerForm(4, 32)),
        stored_tensor("b.weight", IntegerForm(4, 32, Offset.MINIMUM)),
    )
    context = context_of(context_for, small)
    KeepQuantization().run(network, context)
    LowerLinear().run(network, context)
    RemoveDeadCode().run(network, context)
    assert sorted(operators(network)) == ["MatMul", "MatMulNBits"]
    assert any("dequantized" in note for note in context.notes) and any("bit for bit" in note for note in context.notes)
    largest = np.abs(FEED["x"]).max()
    for result, name in zip(evaluate(small, network, FEED), ("a.weight", "b.weight"), strict=True):
        weight = small.tensors[name].read()
        assert (np.abs(result - FEED["x"] @ weight.T) <= largest / 254 * np.abs(weight).sum(axis=1) * 1.01).all()


PAIRS = [
    (IntegerForm(4, 32), IntegerForm(8, 32)),
    (IntegerForm(4, 32), IntegerForm(4, 64, Offset.MINIMUM)),
    (IntegerForm(4, 32), IntegerForm(4, 64, Offset.ZERO_POINT)),
    (IntegerForm(8, 32), IntegerForm(4, 32, Offset.MINIMUM)),
    (IntegerForm(8, 128), IntegerForm(4, 32, Offset.ZERO_POINT)),
    (IntegerForm(8, 64, Offset.MINIMUM), IntegerForm(4, 128, Offset.MINIMUM)),
]


@pytest.mark.parametrize("forms", [*PAIRS, *(pair[::-1] for pair in PAIRS)], ids=str)
def test_parts_of_a_packed_weight_take_a_form_that_holds_all(small, context_for, evaluate, forms):
    tensors = [
        stored_tensor(f"{name}.weight", form, seed) for seed, (name, form) in enumerate(zip("ab", forms, strict=True))
    ]
    network, expected = packed(small, *tensors)
    context = context_of(context_for, small, OWN)
    assert KeepQuantization().run(network, context) == 1
    verify(network.graph, after="keep-quantization")
    magnitude = np.abs(FEED["x"]) @ np.abs(expected).T
    slack = 8 * np.abs(FEED["x"]).sum(axis=-1, keepdims=True) * 4  # -8 * scale as a minimum, scales below 4
    error = np.abs(evaluate(small, network, FEED)[0] - FEED["x"].astype(np.float64) @ expected.T.astype(np.float64))
    assert (error <= (magnitude + slack) * 6e-8 * (INPUTS + 2)).all()
    assert all("bit for bit" in note for note in context.notes)


def packed(small, *tensors):
    """A product by the rows of all tensors, as pack-qkv makes it."""
    b = small.b
    x = b.input("x", DType.FLOAT32, ("batch", "sequence", INPUTS))
    small.tensors.update({tensor.spec.name: tensor for tensor in tensors})
    weight = b.weight("packed.weight", Concat(tuple(Source.of(tensor.spec) for tensor in tensors), 0))
    b.output(b.dialect("Linear", [x, weight], name="packed"), "y")
    return small.finish(), np.concatenate([tensor.read() for tensor in tensors])


def test_minima_beside_zero_points_are_dequantized(small, context_for):
    network, _ = packed(
        small,
        stored_tensor("a.weight", IntegerForm(4, 32, Offset.MINIMUM)),
        stored_tensor("b.weight", IntegerForm(4, 32, Offset.ZERO_POINT)),
    )
    context = context_of(context_for, small, OWN)
    assert KeepQuantization().run(network, context) == 0
    assert "some of its parts have minima and some zero points" in context.notes[0]


def test_what_has_no_integers_is_rounded_to_eight_bits_beside_parts_that_have(small, context_for, evaluate):
    coarse, kept = coarse_tensor("a.weight"), stored_tensor("b.weight", IntegerForm(4, 32, Offset.MINIMUM), 1)
    network, expected = packed(small, coarse, kept)
    context = context_of(context_for, small, OWN)
    assert KeepQuantization().run(network, context) == 1
    largest = np.abs(coarse.read()).reshape(OUTPUTS, -1, 32).max(axis=2).repeat(32, axis=1)
    # half a step of 1/127, and the float16 rounding of the step itself (2^-11 of up to 127 steps)
    error = np.abs(FEED["x"]) @ np.concatenate([largest * (0.5 / 127 + 2.0**-11), np.zeros_like(kept.read())]).T
    magnitude = np.abs(FEED["x"]) @ np.abs(expected).T
    result = evaluate(small, network, FEED)[0]
    assert (np.abs(result - FEED["x"] @ expected.T) <= error + magnitude * 1.2e-7 * INPUTS).all()
    assert any(note.startswith("coarse: 1 weight rounded to 8 bits") for note in context.notes)
    assert "a test: 1 weight kept in 8 bits bit for bit" in context.notes


def test_what_is_finer_than_integers_is_dequantized_and_named(small, context_for, operators):
    fine = coarse_tensor("a.weight")
    fine = QuantizedTensor(fine.spec, StoredQuantization("FP8", None), None, fine.dense)
    network = network_of(small, fine)
    context = context_of(context_for, small, OWN)
    assert KeepQuantization().run(network, context) == 0
    assert operators(network) == ["Linear"]
    assert context.notes == ["FP8: 1 weight dequantized: no integers express it"]


@pytest.mark.parametrize(
    ("options", "words"), [({"quantization": "W4A16"}, "anew as W4A16"), ({"dequantize": True}, "as asked")]
)
def test_another_wish_is_granted_and_said(small, context_for, options, words):
    network = network_of(small, stored_tensor("a.weight", IntegerForm(4, 32)))
    context = context_of(context_for, small, OWN, **options)
    assert KeepQuantization().run(network, context) == 0
    assert words in context.notes[0]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_embeddings_look_up_what_is_stored(small, context_for, evaluate, form, scale):
    table = stored_tensor("table.weight", form)
    small.tensors["table.weight"] = table
    b = small.b
    ids = b.input("ids", DType.INT64, ("batch", "sequence"))
    rows = b.dialect("Embedding", [ids, b.weight("table.weight", Source.of(table.spec))], name="table", scale=scale)
    b.output(b.op("Identity", [rows]), "y")
    network = small.finish()
    context = context_of(context_for, small, OWN)
    assert KeepQuantization().run(network, context) == 1
    RemoveDeadCode().run(network, context)
    verify(network.graph, after="keep-quantization")
    wanted = np.array([[0, 5, 47], [1, 1, 2]])
    result = evaluate(small, network, {"ids": wanted})[0]
    expected = table.read()[wanted] * np.float32(scale)
    # with offsets the rows are float16: half a unit of 11 bits, and the scale's product
    tolerance = 0 if form.offset is Offset.NONE else 2.0**-11 * 1.01
    np.testing.assert_allclose(result, expected, rtol=tolerance)


def test_a_refit_from_another_form_is_refused(small, context_for):
    network = network_of(small, stored_tensor("a.weight", IntegerForm(4, 32)))
    KeepQuantization().run(network, context_of(context_for, small, OWN))
    recipes = [weight.recipe for weight in weights_of(network).values() if "_values" in weight.name]
    for other in (
        stored_tensor("a.weight", IntegerForm(8, 32)),
        stored_tensor("a.weight", IntegerForm(4, 32, Offset.MINIMUM)),
        coarse_tensor("a.weight"),
    ):
        for recipe in recipes:
            with pytest.raises(BadInputError, match="another quantization"):
                RecipeReader({"a.weight": other}).read(recipe)


def test_a_scale_that_float16_cannot_hold_is_refused(small, context_for):
    tensor = stored_tensor("a.weight", IntegerForm(4, 32, scale_dtype=DType.FLOAT32))
    blocks = IntegerBlocks(tensor.blocks.values, lambda start, stop: tensor.blocks.scales(start, stop) * 1e6)
    network = network_of(small, QuantizedTensor(tensor.spec, tensor.stored, blocks))
    KeepQuantization().run(network, context_of(context_for, small, OWN))
    reader = RecipeReader(small.tensors)
    with pytest.raises(BadInputError, match="float16 cannot hold") as caught:
        reader.read(weights_of(network)["a.weight_scales"].recipe)
    assert len(str(caught.value).splitlines()) == 2
