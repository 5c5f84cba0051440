"""Attention spelled out computes what the operator does, and only where the target wants it."""

from dataclasses import replace

import numpy as np
import pytest

from trtllm.compiler.ir.verifier import verify
from trtllm.dtypes import DType
from trtllm.passes.base import PassContext
from trtllm.passes.decompose_attention import DecomposeAttention

RANDOM = np.random.default_rng(5)
HEADS, GROUPS, SIZE, TOKENS, CAPACITY = 6, 2, 8, 3, 7


def attention(small, softcap):
    b = small.b
    query = b.input("q", DType.FLOAT32, ("batch", HEADS, "sequence", SIZE))
    key = b.input("k", DType.FLOAT32, ("batch", GROUPS, CAPACITY, SIZE))
    value = b.input("v", DType.FLOAT32, ("batch", GROUPS, CAPACITY, SIZE))
    mask = b.input("mask", DType.BOOL, ("batch", 1, "sequence", CAPACITY))
    b.output(b.op("Attention", [query, key, value, mask], name="attention", scale=0.3, softcap=softcap), "y")
    return small.finish()


def feed():
    mask = np.arange(CAPACITY) <= RANDOM.integers(0, CAPACITY, (2, 1, TOKENS, 1))
    arrays = {
        name: RANDOM.normal(size=(2, heads, length, SIZE)).astype(np.float32) * 3
        for name, heads, length in (("q", HEADS, TOKENS), ("k", GROUPS, CAPACITY), ("v", GROUPS, CAPACITY))
    }
    return {**arrays, "mask": mask}


def with_capabilities(context, **changes):
    return PassContext(context.build, replace(context.capabilities, **changes))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_the_products_give_what_the_operator_gives(small, context, evaluate, operators, softcap) -> None:
    network, values = attention(small, softcap), feed()
    before = evaluate(small, network, values)
    assert DecomposeAttention().run(network, context) == 1  # this target has no Attention
    verify(network.graph, after="decompose-attention")
    assert "Attention" not in operators(network) and operators(network).count("MatMul") == 2
    np.testing.assert_allclose(evaluate(small, network, values)[0], before[0], atol=2e-6)


@pytest.mark.parametrize(("softcap", "takes_softcap", "changes"), [(5.0, False, 1), (5.0, True, 0), (0.0, False, 0)])
def test_a_target_with_the_operator_keeps_it_but_for_softcaps(small, context, softcap, takes_softcap, changes) -> None:
    capable = with_capabilities(context, operators=frozenset({"::Attention"}), supports_softcap=takes_softcap)
    assert DecomposeAttention().run(attention(small, softcap), capable) == changes
