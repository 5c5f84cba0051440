"""A lowered mixture of experts computes what its reference body does, and reads what the operators want."""

import numpy as np
import pytest

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Affine, Concat, Recipe, Stack
from trtllm.compiler.ir.verifier import verify
from trtllm.compiler.ir.weights import Weight, weight_of
from trtllm.dtypes import DType
from trtllm.passes.cleanup import RemoveDeadCode
from trtllm.passes.lower_moe import LowerMoE, interleaved
from trtllm.passes.quantize import QuantizeWeights

MOE, QMOE = "com.microsoft::MoE", "com.microsoft::QMoE"
EXPERTS, HIDDEN, WIDTH = 4, 64, 32
FEED = {"x": np.random.default_rng(1).normal(size=(2, 5, HIDDEN)).astype(np.float32)}


def mixture(small, *, top_k=2, normalize=1, kind="silu", width=WIDTH):
    """MoE over stacks of one tensor an expert."""
    b = small.b
    x = b.input("x", DType.FLOAT32, ("batch", "sequence", HIDDEN))
    logits = b.dialect("Linear", [x, small.weight("gate.weight", EXPERTS, HIDDEN)], name="gate")
    stacks = [stack(small, "gate", "up", shape=(width, HIDDEN)), stack(small, "down", shape=(HIDDEN, width))]
    y = b.dialect("MoE", [x, logits, *stacks], name="experts", top_k=top_k, normalize=normalize, kind=kind)
    b.output(y, "y")
    return small.finish()


def stack(small, *names, shape):
    """[E, ...]: each expert's random matrices one below the other, scaled to keep the size of their inputs."""

    def matrix(name: str) -> Recipe:
        recipe = weight_of(small.weight(name, *shape)).recipe
        small.graph.initializers.pop(name)
        return Affine(recipe, scale=shape[1] ** -0.5)

    experts = [tuple(matrix(f"{name}.{expert}") for name in names) for expert in range(EXPERTS)]
    recipes = (parts[0] if len(parts) == 1 else Concat(parts, axis=0) for parts in experts)
    return small.b.weight("_".join(names), Stack(tuple(recipes)))


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_experts_become_one_operator_with_the_same_result(
    small, context_for, evaluate, operators, top_k, normalize
) -> None:
    network = mixture(small, top_k=top_k, normalize=normalize)
    context = context_for(MOE)
    before = evaluate(small, network, FEED)[0]
    assert LowerMoE().run(network, context) == 1
    RemoveDeadCode().run(network, context)
    verify(network.graph, after="lower-moe")
    assert operators(network) == ["Linear", "Reshape", "MoE"]
    # Two products of 64 and 32 terms in another order: eps * (sqrt(64) + sqrt(32)) of the largest, and as much for
    # the routing's softmax.
    tolerance = np.finfo(np.float32).eps * 2 * (8 + 6) * np.abs(before).max()
    np.testing.assert_allclose(evaluate(small, network, FEED)[0], before, rtol=0, atol=tolerance)


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
def test_quantized_experts_agree_up_to_their_rounded_activations(
    small, context_for, evaluate, operators, scheme, normalize
) -> None:
    network = mixture(small, normalize=normalize)
    context = context_for(QMOE, quantization=scheme)
    QuantizeWeights().run(network, context)
    exact = evaluate(small, network, FEED)[0]
    assert LowerMoE().run(network, context) == 1
    RemoveDeadCode().run(network, context)
    verify(network.graph, after="lower-moe")
    assert operators(network)[-1] == "QMoE"
    assert "DequantizeLinear" not in operators(network)
    # Inputs of both products are rounded to steps of a block's largest / 127: with normal values 2.4 deviations for 32,
    # step / sqrt(12) an element; that share of the root mean square, twice, and half as much again for the gate.
    allowed = 3 * 2.4 / 127 / np.sqrt(12) * np.sqrt(np.mean(exact**2))
    assert np.sqrt(np.mean((evaluate(small, network, FEED)[0] - exact) ** 2)) <= allowed


def test_the_router_keeps_its_weights(small, context_for, operators) -> None:
    context = context_for(quantization="W4A16")
    network = mixture(small)
    assert QuantizeWeights().run(network, context) == 2
    assert operators(network) == ["Linear", "DequantizeLinear", "DequantizeLinear", "MoE"]
    assert "routes tokens" in context.near_misses[0].reason


def test_experts_are_quantized_both_or_not(small, context_for, operators) -> None:
    context = context_for(quantization="W4A16")
    network = mixture(small, width=24)
    assert QuantizeWeights().run(network, context) == 0
    assert operators(network) == ["Linear", "MoE"]
    assert "24 inputs" in context.notes[0]


@pytest.mark.parametrize(
    ("options", "capabilities", "reason"),
    [({"kind": "gelu"}, (MOE, QMOE), "gelu"), ({}, (QMOE,), "lacks MoE"), ({}, (), "lacks MoE")],
)
def test_a_mixture_that_no_operator_runs_is_left_with_a_reason(
    small, context_for, operators, options, capabilities, reason
) -> None:
    context = context_for(*capabilities)
    network = mixture(small, **options)
    assert LowerMoE().run(network, context) == 0
    assert operators(network) == ["Linear", "MoE"]
    assert reason in context.near_misses[0].reason
    assert context.notes == [f"experts of 1 layers all run for every token: {context.near_misses[0].reason}"]


def test_gate_and_up_rows_alternate_and_quantization_does_not_see_the_order(small, context_for) -> None:
    network = mixture(small)
    reader = RecipeReader(small.tensors)
    recipe = weight(network, "gate_up").recipe
    original = reader.read(recipe)
    turned = reader.read(interleaved(recipe))
    np.testing.assert_array_equal(turned[:, 0::2], original[:, :WIDTH])
    np.testing.assert_array_equal(turned[:, 1::2], original[:, WIDTH:])
    QuantizeWeights().run(network, context_for(quantization="W8A16"))
    for name in ("gate_up_values", "gate_up_scales"):
        recipe = weight(network, name).recipe
        whole, turned = reader.read(recipe), reader.read(interleaved(recipe))
        np.testing.assert_array_equal(turned[:, 0::2], whole[:, :WIDTH])
        np.testing.assert_array_equal(turned[:, 1::2], whole[:, WIDTH:])


def weight(network, name) -> Weight:
    return network.graph.initializers[name].const_value
