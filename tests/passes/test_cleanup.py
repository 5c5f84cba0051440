"""Cleanup passes shrink a graph and keep its results."""

import numpy as np

from trtllm.compiler.ir.verifier import verify
from trtllm.dtypes import DType
from trtllm.passes.cleanup import FoldConstants, RemoveDeadCode, ShareCommonSubexpressions

FEED = {"x": np.random.default_rng(4).normal(size=(2, 8)).astype(np.float32)}


def graph(small):
    b = small.b
    x = b.input("x", DType.FLOAT32, ("batch", 8))
    three = b.op("Sub", [b.constant(4.0), b.constant(1.0)], (), name="three")
    first, second = b.op("Exp", [x], name="first"), b.op("Exp", [x], name="second")
    b.op("Mul", [x, small.weight("unused", 8)], name="unused")
    used = b.op("Mul", [first, small.weight("used", 8)], name="weighted")
    b.output(b.op("Mul", [b.op("Add", [used, second]), three]), "y")
    return small.finish()


def test_dead_nodes_and_weights_go(small, context, evaluate, operators) -> None:
    network = graph(small)
    before = evaluate(small, network, FEED)[0]
    assert RemoveDeadCode().run(network, context) == 2
    assert "unused" not in network.graph.initializers
    np.testing.assert_array_equal(evaluate(small, network, FEED)[0], before)
    assert RemoveDeadCode().run(network, context) == 0


def test_constants_are_computed_once_and_weights_are_not_read(small, context, evaluate, operators) -> None:
    network = graph(small)
    before = evaluate(small, network, FEED)[0]
    assert FoldConstants().run(network, context) == 1
    verify(network.graph, after="fold-constants")
    assert "Sub" not in operators(network)
    np.testing.assert_array_equal(evaluate(small, network, FEED)[0], before)


def test_equal_expressions_are_computed_once(small, context, evaluate, operators) -> None:
    network = graph(small)
    before = evaluate(small, network, FEED)[0]
    assert ShareCommonSubexpressions().run(network, context) == 1
    assert operators(network).count("Exp") == 1
    np.testing.assert_array_equal(evaluate(small, network, FEED)[0], before)
