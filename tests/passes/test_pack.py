"""Packing joins projections without changing what they compute, and says why it leaves others alone."""

import numpy as np
import pytest

from trtllm.checkpoints.recipes import Concat
from trtllm.compiler.ir.verifier import verify
from trtllm.dtypes import DType
from trtllm.passes.cleanup import RemoveDeadCode
from trtllm.passes.pack import PackGateUp, PackQkv

FEED = {"x": np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)}


def mlp(small, *, bias=(False, False), second_input=False):
    b = small.b
    x = b.input("x", DType.FLOAT32, ("batch", "sequence", 8))
    other = b.op("Neg", [x]) if second_input else x
    projections = []
    for name, operand, has_bias in (("mlp.gate_proj", x, bias[0]), ("mlp.up_proj", other, bias[1])):
        inputs = [operand, small.weight(f"{name}.weight", 16, 8)]
        if has_bias:
            inputs.append(small.weight(f"{name}.bias", 16))
        projections.append(b.dialect("Linear", inputs, name=name))
    b.output(b.dialect("GatedActivation", projections, kind="silu"), "y")
    return small.finish()


def attention(small, *, lengths_of=(16, 8, 8)):
    b = small.b
    x = b.input("x", DType.FLOAT32, ("batch", "sequence", 8))
    lengths = b.input("lengths", DType.INT64, ("batch",))
    names = ("q", "k", "v")
    parts = [
        b.dialect("Linear", [x, small.weight(f"attn.{n}_proj.weight", 16, 8)], name=f"attn.{n}_proj") for n in names
    ]
    b.output(b.dialect("EncoderAttention", [*parts, lengths], num_heads=2, head_size=8, scale=0.3), "y")
    return small.finish()


@pytest.mark.parametrize("bias", [(False, False), (True, True)])
def test_gate_and_up_become_one_product_with_the_same_result(small, context, evaluate, operators, bias) -> None:
    network = mlp(small, bias=bias)
    before = evaluate(small, network, FEED)
    assert PackGateUp().run(network, context) == 1
    RemoveDeadCode().run(network, context)
    verify(network.graph, after="pack-gate-up")
    assert operators(network) == ["Linear", "GatedActivation"]
    assert next(iter(network.graph.initializers)) == "mlp.gate_up_proj.weight"
    np.testing.assert_array_equal(evaluate(small, network, FEED)[0], before[0])


def test_query_key_and_value_become_one_product_and_a_split(small, context, evaluate, operators) -> None:
    network = attention(small)
    feed = {**FEED, "lengths": np.array([3, 2])}
    before = evaluate(small, network, feed)
    assert PackQkv().run(network, context) == 1
    RemoveDeadCode().run(network, context)
    verify(network.graph, after="pack-qkv")
    assert operators(network) == ["Linear", "Split", "EncoderAttention"]
    recipe = network.graph.initializers["attn.qkv_proj.weight"].const_value.recipe
    assert isinstance(recipe, Concat)
    assert recipe.sources() == ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight")
    np.testing.assert_array_equal(evaluate(small, network, feed)[0], before[0])


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"bias": (True, False)}, "only some"), ({"second_input": True}, "different inputs")],
)
def test_projections_that_do_not_fit_are_left_alone_with_a_reason(small, context, operators, options, reason) -> None:
    network = mlp(small, **options)
    before = operators(network)
    assert PackGateUp().run(network, context) == 0
    assert operators(network) == before
    assert reason in context.near_misses[0].reason


def test_packing_twice_changes_nothing_more(small, context) -> None:
    network = mlp(small)
    assert PackGateUp().run(network, context) == 1
    assert PackGateUp().run(network, context) == 0
