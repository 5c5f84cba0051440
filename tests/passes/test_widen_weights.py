"""Weights without small integers: what blocks stand for, bit for bit, and int8 products that round their weight."""

from dataclasses import replace

import numpy as np
import pytest

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Dequantized, QuantizedScales, QuantizedValues, Source, recipe_from_json
from trtllm.compiler.ir.weights import unpack_int4, weight_of
from trtllm.dtypes import DType
from trtllm.passes.base import ChannelRanges
from trtllm.passes.quantize import QuantizeWeights
from trtllm.passes.quantize_scaled import QuantizeScaled
from trtllm.passes.widen_weights import WidenWeights

INPUTS, OUTPUTS = 128, 24
FLOATS = frozenset({DType.FLOAT32, DType.FLOAT16, DType.INT64})


def _network(small):
    x = small.b.input("x", DType.FLOAT32, ("rows", INPUTS))
    small.b.output(small.b.dialect("Linear", [x, small.weight("w", OUTPUTS, INPUTS)], name="linear"), "y")
    return small.finish()


def _context(context_for, *operators, value_dtypes=FLOATS, **build):
    context = context_for(*operators, **build)
    table = replace(context.capabilities, lists_every_operator=True, value_dtypes=value_dtypes)
    return replace(context, capabilities=table)


@pytest.mark.parametrize("to", [DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16])
@pytest.mark.parametrize("bits", [4, 8])
def test_each_integer_is_multiplied_by_its_scale_and_rounded_once(small, bits, to) -> None:
    small.weight("w", OUTPUTS, INPUTS)
    source = Source.of(small.tensors["w"].spec)
    half = DType.BFLOAT16 if to is DType.BFLOAT16 else DType.FLOAT16
    values = QuantizedValues(source, bits, 32, half)
    reader = RecipeReader(small.tensors, chunk_bytes=5 * 4 * INPUTS)
    integers, scales = reader.read(values), reader.read(QuantizedScales(source, bits, 32, half))
    integers = (unpack_int4(integers) if bits == 4 else integers).astype(np.float64)
    expected = (integers * np.repeat(scales.astype(np.float64), 32, axis=1)).astype(np.float32).astype(to.numpy)
    recipe = recipe_from_json(Dequantized(values, to).to_json())
    found = np.concatenate(list(reader.chunks(recipe)))
    assert (found.dtype, found.shape) == (to.numpy, (OUTPUTS, INPUTS))
    np.testing.assert_array_equal(found, expected)
    assert len(list(reader.chunks(recipe))) > 1


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
def test_blocks_become_what_they_stand_for(small, context_for, evaluate, operators, scheme) -> None:
    network = _network(small)
    data = {"x": np.random.default_rng(1).normal(size=(3, INPUTS)).astype(np.float32)}
    context = _context(context_for, quantization=scheme)
    QuantizeWeights().run(network, context)
    (expected,) = evaluate(small, network, data)
    assert WidenWeights().run(network, context) == 1
    assert "DequantizeLinear" not in operators(network)
    (found,) = evaluate(small, network, data)
    np.testing.assert_allclose(found, expected, atol=1e-5 * INPUTS, rtol=0)
    assert any(f"rounded to {scheme[1]} bits and stored as float32" in note for note in context.notes)


def test_blocks_stay_where_the_target_multiplies_by_them(small, context_for) -> None:
    network = _network(small)
    context = _context(context_for, "::DequantizeLinear", quantization="W4A16")
    QuantizeWeights().run(network, context)
    assert WidenWeights().run(network, context) == 0


@pytest.mark.parametrize("scheme", ["W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN"])
def test_a_product_of_int8_rounds_its_weight_to_the_same_integers(small, context_for, evaluate, scheme) -> None:
    network = _network(small)
    data = {"x": np.random.default_rng(2).normal(size=(3, INPUTS)).astype(np.float32)}
    context = _context(context_for, quantization=scheme)
    weight = small.tensors["w"].read(0, OUTPUTS)
    context.ranges["w"] = ChannelRanges(np.abs(data["x"]).max(axis=0), np.abs(weight).max(axis=0))
    QuantizeScaled().run(network, context)
    (expected,) = evaluate(small, network, data)
    kept = replace(context, capabilities=replace(context.capabilities, value_dtypes=FLOATS | {DType.INT8}))
    assert WidenWeights().run(network, kept) == 0
    assert WidenWeights().run(network, context) == 1
    (node,) = [node for node in network.graph if node.op_type == "ScaledLinear"]
    stored = weight_of(node.inputs[1])
    assert stored is not None and stored.recipe.dtype is DType.FLOAT32
    (found,) = evaluate(small, network, data)
    np.testing.assert_allclose(found, expected, atol=1e-5 * INPUTS, rtol=0)
