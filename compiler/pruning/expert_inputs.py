"""Measures what goes into the matrices of a mixture's experts: each expert sees the tokens that are routed to it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from trtllm.compiler.ir.builder import OPSET
from trtllm.compiler.ir.dialect import DOMAIN, attributes_of
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.targets.onnxruntime.graph_session import GraphSession


class ExpertInputs:
    """What goes into the matrices of each expert of a mixture, over the tokens that are routed to it."""

    def __init__(
        self, network: Network, node: ir.Node, payloads: Mapping[str, np.ndarray], weights: Mapping[str, Weight]
    ) -> None:
        """Takes the mixture's two stacks from `payloads`, and the experts' names from their recipes."""
        self._states, self._logits, gate_up, down = (value.name or "" for value in node.inputs if value is not None)
        self._top_k = int(attributes_of(node)["top_k"])
        self._gate_up = payloads[gate_up]
        self._session = _gate_session(network, self._gate_up.shape, str(attributes_of(node)["kind"]))
        count, double, hidden = self._gate_up.shape
        self._names = [np.array_split(weights[stack].recipe.sources(), count) for stack in (gate_up, down)]
        self._counts = np.zeros(count)
        self._squares = [np.zeros((count, hidden)), np.zeros((count, double // 2))]

    def add(self, given: Mapping[str, np.ndarray]) -> None:
        """Adds a batch's states [rows, S, H] and logits of the router [rows, S, E]."""
        states = given[self._states].reshape(-1, self._gate_up.shape[2])
        logits = given[self._logits].reshape(len(states), -1)
        chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : self._top_k]
        for expert, matrix in enumerate(self._gate_up):
            own = states[(chosen == expert).any(axis=1)]
            if not len(own):
                continue
            (inner,) = self._session.run({"states": own, "matrix": matrix}, ["inner"])
            self._counts[expert] += len(own)
            self._squares[0][expert] += sum_of_squares(own)
            self._squares[1][expert] += sum_of_squares(inner)

    def means(self) -> dict[str, np.ndarray]:
        """Mean squares, float64 [K], by the names of the experts' matrices; ones for an expert that no token chose."""
        found: dict[str, np.ndarray] = {}
        for stack, squares in zip(self._names, self._squares, strict=True):
            for names, total, count in zip(stack, squares, self._counts, strict=True):
                mean = total / count if count else np.ones_like(total)
                found.update(dict.fromkeys(map(str, names), mean))
        return found


def _gate_session(network: Network, shape: tuple[int, ...], kind: str) -> GraphSession:
    """states [T, H] and an expert's matrix [2F, H] to what goes into its second matrix, "inner" [T, F]."""
    _, double, hidden = shape
    real = ir.TensorType(ir.DataType.FLOAT)
    states = ir.Value(name="states", shape=ir.Shape(["tokens", hidden]), type=real)
    matrix = ir.Value(name="matrix", shape=ir.Shape([double, hidden]), type=real)
    product = ir.Value(name="product", shape=ir.Shape(["tokens", double]), type=real)
    inner = ir.Value(name="inner", shape=ir.Shape(["tokens", double // 2]), type=real)
    nodes = [
        ir.Node("", "Gemm", [states, matrix], [ir.AttrInt64("transB", 1)], outputs=[product]),
        ir.Node(DOMAIN, "GatedActivation", [product], [ir.AttrString("kind", kind)], outputs=[inner]),
    ]
    graph = ir.Graph([states, matrix], [inner], nodes=nodes, opset_imports={"": OPSET, DOMAIN: 1}, name="expert")
    return GraphSession(Network(ir.Model(graph, ir_version=network.model.ir_version), network.info))


def sum_of_squares(values: np.ndarray) -> np.ndarray:
    """Sum of the squares over all but the last axis, float64."""
    return np.square(values.reshape(-1, values.shape[-1]).astype(np.float64)).sum(axis=0)
