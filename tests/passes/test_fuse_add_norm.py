"""A residual sum and its norm become one node, whose sum later readers still see."""

import numpy as np
import pytest

from trtllm.compiler.ir.verifier import verify
from trtllm.dtypes import DType
from trtllm.passes.fuse_add_norm import FuseAddNorm

RANDOM = np.random.default_rng(2)
FEED = {name: RANDOM.normal(size=(2, 3, 8)).astype(np.float32) for name in ("x", "r")}


def block(small, *, norm="RMSNorm", early_reader=False, same_shape=True):
    b = small.b
    x = b.input("x", DType.FLOAT32, ("batch", "sequence", 8))
    residual = b.input("r", DType.FLOAT32, ("batch", "sequence", 8 if same_shape else 1))
    total = b.op("Add", [x, residual], name="sum")
    early = b.op("Neg", [total], name="early") if early_reader else None
    inputs = [total, small.weight("norm.weight", 8)]
    if norm == "LayerNorm":
        inputs.append(small.weight("norm.bias", 8))
    y = b.dialect(norm, inputs, name="norm", epsilon=1e-5)
    b.output(b.op("Mul", [y, total]), "y")
    b.output(early if early is not None else b.op("Neg", [total]), "s")
    return small.finish()


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_the_sum_and_the_norm_become_one_node(small, context, evaluate, operators, norm) -> None:
    network = block(small, norm=norm)
    before = evaluate(small, network, FEED)
    assert FuseAddNorm().run(network, context) == 1
    verify(network.graph, after="fuse-add-norm")
    assert operators(network) == [f"Add{norm}", "Mul", "Neg"]
    for result, expected in zip(evaluate(small, network, FEED), before, strict=True):
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"early_reader": True}, "read before"), ({"same_shape": False}, "different shapes")],
)
def test_a_sum_that_cannot_move_is_left_alone_with_a_reason(small, context, options, reason) -> None:
    network = block(small, **options)
    assert FuseAddNorm().run(network, context) == 0
    assert reason in context.near_misses[0].reason
