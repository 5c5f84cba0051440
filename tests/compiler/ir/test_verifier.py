"""The verifier refuses every kind of broken graph, naming the pass and the place, and passes a legal one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from trtllm.checkpoints.recipes import Source
from trtllm.compiler.ir.builder import OPSET, GraphBuilder
from trtllm.compiler.ir.dialect import DOMAIN, OPERATORS
from trtllm.compiler.ir.verifier import verify
from trtllm.dtypes import DType
from trtllm.errors import GraphError


@pytest.fixture
def b() -> GraphBuilder:
    """A legal graph: y = silu(RMSNorm(x, w))."""
    b = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name="small"))
    x = b.input("x", DType.FLOAT32, ("batch", "sequence", 8))
    normed = b.dialect("RMSNorm", [x, b.weight("w", Source("w", (8,), DType.FLOAT32))], name="norm")
    b.output(b.dialect("Activation", [normed], name="act", kind="silu"), "y")
    return b


def norm(b: GraphBuilder) -> ir.Node:
    return b.created[0]


def unknown_domain(b: GraphBuilder) -> None:
    b.op("Gelu", [b.graph.inputs[0]], domain="ai.somebody", name="stranger")


def late_operand(b: GraphBuilder) -> None:
    b.graph.remove(norm(b))
    b.graph.append(norm(b))


def unknown_operator(b: GraphBuilder) -> None:
    b.op("Attentoin", [b.graph.inputs[0]], domain=DOMAIN, name="typo")


def too_few_inputs(b: GraphBuilder) -> None:
    norm(b).resize_inputs(1)


def empty_input(b: GraphBuilder) -> None:
    norm(b).replace_input_with(1, None)


def too_many_inputs(b: GraphBuilder) -> None:
    norm(b).resize_inputs(3)


def missing_attribute(b: GraphBuilder) -> None:
    del b.created[1].attributes["kind"]


def unknown_attribute(b: GraphBuilder) -> None:
    norm(b).attributes["epsilom"] = ir.AttrFloat32("epsilom", 1e-6)


def too_many_outputs(b: GraphBuilder) -> None:
    norm(b).resize_outputs(2)


def untyped_output(b: GraphBuilder) -> None:
    norm(b).outputs[0].type = None


def name_made_twice(b: GraphBuilder) -> None:
    b.dialect("Activation", [b.graph.inputs[0]], name="other", kind="relu").name = "norm_out"


def initializer_without_value(b: GraphBuilder) -> None:
    b.graph.initializers["w"].const_value = None


def misshapen_weight(b: GraphBuilder) -> None:
    b.graph.initializers["w"].shape = ir.Shape((9,))


def mistyped_weight(b: GraphBuilder) -> None:
    b.graph.initializers["w"].type = ir.TensorType(ir.DataType.FLOAT16)


def output_never_made(b: GraphBuilder) -> None:
    b.graph.outputs.append(ir.Value(name="z"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unknown_domain, "Gelu 'stranger' has unknown domain 'ai.somebody'"),
        (late_operand, "Activation 'act' reads 'norm_out' before it is made"),
        (unknown_operator, "Attentoin 'typo' is no operator of the dialect"),
        (too_few_inputs, "RMSNorm 'norm' has 1 inputs, takes 2 to 2"),
        (empty_input, "RMSNorm 'norm' has 2 inputs, takes 2 to 2"),
        (too_many_inputs, "RMSNorm 'norm' has 3 inputs, takes 2 to 2"),
        (missing_attribute, "Activation 'act': operator Activation needs attribute kind"),
        (unknown_attribute, "has no attribute 'epsilom' (did you mean 'epsilon'?)"),
        (too_many_outputs, "RMSNorm 'norm' has 2 outputs, makes 1"),
        (untyped_output, "RMSNorm 'norm' has an output without type"),
        (name_made_twice, "Activation 'other' makes 'norm_out' a second time"),
        (initializer_without_value, "initializer 'w' has no value"),
        (misshapen_weight, "weight 'w' is declared [9], its recipe makes (8,)"),
        (mistyped_weight, "weight 'w' is declared FLOAT16, its recipe makes"),
        (output_never_made, "graph output 'z' is never made"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_graph_is_refused_with_the_pass_and_the_place(
    b: GraphBuilder, damage: Callable[[GraphBuilder], None], message: str
) -> None:
    damage(b)
    with pytest.raises(GraphError) as caught:
        verify(b.graph, after="pass break-things")
    assert str(caught.value).startswith("after pass break-things the graph is not legal: ")
    assert message in str(caught.value)


def test_a_legal_graph_passes(b: GraphBuilder) -> None:
    verify(b.graph, after="the test")


def test_many_problems_are_counted_not_listed(b: GraphBuilder) -> None:
    for index in range(9):
        b.op("Gelu", [b.graph.inputs[0]], domain="ai.somebody", name=f"stranger{index}")
    with pytest.raises(GraphError, match=r"stranger4.*; and 4 more"):
        verify(b.graph, after="the test")


def test_a_node_with_features_that_its_weight_does_not_take_is_refused_when_it_is_made(b: GraphBuilder) -> None:
    weight = b.weight("v", Source("v", (4, 9), DType.FLOAT32))
    with pytest.raises(GraphError, match="Linear 'up': input has 8 features, weight takes 9"):
        b.dialect("Linear", [b.graph.inputs[0], weight], name="up")


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_description_and_a_body(name: str) -> None:
    from trtllm.compiler.ir.reference import BODIES

    assert OPERATORS[name].doc.endswith(".")
    assert name in BODIES


def test_constants_share_a_value_and_weights_a_name(b: GraphBuilder) -> None:
    assert b.constant([1, 2]) is b.constant(np.array([1, 2]))
    assert b.constant(1) is not b.constant(1.0)
    assert b.weight("w", Source("w", (8,), DType.FLOAT32)) is b.graph.initializers["w"]
