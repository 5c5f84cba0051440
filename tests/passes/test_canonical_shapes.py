"""Extents are read from graph inputs or known at once, so that what each layer counts is counted once."""

import numpy as np

from trtllm.compiler.ir.verifier import verify
from trtllm.dtypes import DType
from trtllm.passes.canonical_shapes import CanonicalShapes

FEED = {"ids": np.zeros((2, 5), np.int64), "hidden": np.zeros((2, 5, 8), np.float32)}


def shapes_of(small, ranges):
    b = small.b
    b.input("ids", DType.INT64, ("batch", "sequence"))
    hidden = b.input("hidden", DType.FLOAT32, ("batch", "sequence", 8))
    inner = b.op("Neg", [hidden], name="inner")
    for start, end in ranges:
        extents = b.op("Shape", [inner], (end - start,), DType.INT64, start=start, end=end)
        b.output(b.op("Neg", [extents]), f"shape_{start}_{end}")
    b.output(inner, "y")
    return small.finish()


def test_a_symbolic_extent_is_read_from_the_first_input_that_has_it(small, context, evaluate) -> None:
    network = shapes_of(small, [(0, 1), (1, 2)])
    before = evaluate(small, network, FEED)
    assert CanonicalShapes().run(network, context) == 2
    verify(network.graph, after="canonical-shapes")
    assert {node.inputs[0].name for node in network.graph if node.op_type == "Shape"} == {"ids"}
    for result, expected in zip(evaluate(small, network, FEED), before, strict=True):
        np.testing.assert_array_equal(result, expected)
    assert CanonicalShapes().run(network, context) == 0


def test_a_constant_extent_needs_no_node(small, context, evaluate, operators) -> None:
    network = shapes_of(small, [(2, 3)])
    before = evaluate(small, network, FEED)
    assert CanonicalShapes().run(network, context) == 1
    assert "Shape" not in operators(network)
    np.testing.assert_array_equal(evaluate(small, network, FEED)[0], before[0])


def test_mixed_extents_stay_with_a_reason(small, context) -> None:
    network = shapes_of(small, [(1, 3)])
    assert CanonicalShapes().run(network, context) == 0
    assert "mixes extents" in context.near_misses[0].reason
