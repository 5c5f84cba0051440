"""What a legal graph is; run after every pass that changed something."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.ir.dialect import DOMAIN, OPERATORS, attributes_of
from trtllm.compiler.ir.weights import IR_TYPES, Weight
from trtllm.errors import GraphError

DOMAINS = ("", DOMAIN, "com.microsoft", "trtllm.cpu")


def verify(graph: ir.Graph, *, after: str) -> None:
    """Raises GraphError that names the pass `after` which the graph broke, and the node or value."""
    problems = [*_initializer_problems(graph), *_node_problems(graph), *_output_problems(graph)]
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise GraphError(f"after {after} the graph is not legal: {listed}", "this is a defect of the toolchain")


def _initializer_problems(graph: ir.Graph) -> list[str]:
    problems = []
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            problems.append(f"initializer '{name}' has no value")
        elif isinstance(tensor, Weight):
            if tuple(value.shape or ()) != tensor.recipe.shape:
                problems.append(f"weight '{name}' is declared {value.shape}, its recipe makes {tensor.recipe.shape}")
            if value.dtype != IR_TYPES[tensor.recipe.dtype]:
                problems.append(f"weight '{name}' is declared {value.dtype}, its recipe makes {tensor.recipe.dtype}")
    return problems


def _node_problems(graph: ir.Graph) -> list[str]:
    problems = []
    known = {id(value) for value in graph.inputs} | {id(value) for value in graph.initializers.values()}
    names: set[str] = set()
    for node in graph:
        label = f"{node.op_type} '{node.name}'"
        if node.domain not in DOMAINS:
            problems.append(f"{label} has unknown domain '{node.domain}'")
        unmade = [value for value in node.inputs if value is not None and id(value) not in known]
        problems += [f"{label} reads '{value.name}' before it is made" for value in unmade]
        if node.domain == DOMAIN:
            problems += _dialect_problems(node, label)
        for value in node.outputs:
            known.add(id(value))
            if value.name and value.name in names:
                problems.append(f"{label} makes '{value.name}' a second time")
            names.add(value.name or "")
    return problems


def _dialect_problems(node: ir.Node, label: str) -> list[str]:
    operator = OPERATORS.get(node.op_type)
    if operator is None:
        return [f"{label} is no operator of the dialect"]
    problems = []
    fewest, most = operator.arity
    if not fewest <= len(node.inputs) <= most or any(value is None for value in node.inputs[:fewest]):
        problems.append(f"{label} has {len(node.inputs)} inputs, takes {fewest} to {most}")
    try:
        attributes = attributes_of(node)
    except GraphError as error:
        return [*problems, f"{label}: {error.what}"]
    if len(node.outputs) != operator.output_count(attributes):
        problems.append(f"{label} has {len(node.outputs)} outputs, makes {operator.output_count(attributes)}")
    if any(value.dtype is None or value.shape is None for value in node.outputs):
        problems.append(f"{label} has an output without type")
    return problems


def _output_problems(graph: ir.Graph) -> list[str]:
    produced = {id(value) for node in graph for value in node.outputs} | {id(value) for value in graph.inputs}
    return [f"graph output '{value.name}' is never made" for value in graph.outputs if id(value) not in produced]
