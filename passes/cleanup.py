"""Passes that make a graph smaller without changing what it computes: dead code, constants, repeated expressions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import Weight
from trtllm.passes.base import Pass, PassContext, replace

FOLD_LIMIT = 1 << 20
"""Elements above which a constant result is left to be computed."""


class RemoveDeadCode(Pass):
    """Remove nodes whose results nobody reads, and initializers that nobody uses.

    y = Mul(x, w)   (y unused)     becomes     nothing
    """

    name = "remove-dead-code"

    def run(self, network: Network, context: PassContext) -> int:
        before = len(network.graph) + len(network.graph.initializers)
        RemoveUnusedNodesPass()(network.model)
        return before - len(network.graph) - len(network.graph.initializers)


class ShareCommonSubexpressions(Pass):
    """Compute equal expressions once.

    a = Shape(x); b = Shape(x)     becomes     a = Shape(x), read by both
    """

    name = "share-common-subexpressions"

    def run(self, network: Network, context: PassContext) -> int:
        before = len(network.graph)
        CommonSubexpressionEliminationPass()(network.model)
        return before - len(network.graph)


class FoldConstants(Pass):
    """Evaluate nodes whose inputs are all small constants; weights are never read.

    y = Sub(4, 1)     becomes     y = 3
    """

    name = "fold-constants"

    def run(self, network: Network, context: PassContext) -> int:
        count = 0
        for node in list(network.graph):
            values = _constant_inputs(node)
            if values is None or any(output.is_graph_output() for output in node.outputs):
                continue
            results = _evaluate(node, values)
            if results is None or sum(result.size for result in results) > FOLD_LIMIT:
                self.miss(context, node, "its value cannot be computed at build time, or is too large to store")
                continue
            replace(node, [_initializer(network.graph, node, i, r) for i, r in enumerate(results)])
            count += 1
        return count


def _constant_inputs(node: ir.Node) -> list[np.ndarray | None] | None:
    """The values of a node's inputs, None when one is not a small constant."""
    if node.domain or not node.inputs or node.op_type in ("DequantizeLinear", "QuantizeLinear"):
        return None
    values: list[np.ndarray | None] = []
    for value in node.inputs:
        if value is None:
            values.append(None)
            continue
        tensor = value.const_value
        if tensor is None or isinstance(tensor, Weight) or tensor.size > FOLD_LIMIT:
            return None
        values.append(tensor.numpy())
    return values


def _evaluate(node: ir.Node, values: list[np.ndarray | None]) -> list[np.ndarray] | None:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(ir.to_proto(node), opsets={"": 24})
    named = zip(node.inputs, values, strict=True)
    names: dict[str, Any] = {value.name or "": array for value, array in named if value is not None}
    try:
        return [np.asarray(result) for result in evaluator.run(None, names)]
    except Exception:  # an operator that the evaluator lacks is simply not folded
        return None


def _initializer(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> ir.Value:
    name = node.outputs[index].name or f"folded_{id(node)}_{index}"
    node.outputs[index].name = None
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
