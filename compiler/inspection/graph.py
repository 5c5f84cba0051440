"""The graph of an engine as operators by decoder layer: read from rank0.engine without its weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtllm.compiler.engine import ENGINE, Engine, WeightEntry
from trtllm.errors import BadInputError

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|encoder)\.(\d+)(?:[./]|$)")


@dataclass(frozen=True)
class Operator:
    """A node of the graph."""

    name: str
    kind: str
    """Operator type, with its domain before it where that is not ONNX's own: "trtllm.cpu.PagedAttention"."""
    weights: tuple[str, ...]
    """Names of the weights it reads."""
    nbytes: int
    """Of these."""
    reads: tuple[str, ...] = ()
    """Names of the operators whose outputs it reads, and of the graph's inputs."""


@dataclass(frozen=True)
class Box:
    """The operators of one decoder layer, or of what stands before, between or behind them."""

    title: str
    operators: tuple[Operator, ...]

    @property
    def nbytes(self) -> int:
        return sum(operator.nbytes for operator in self.operators)


@dataclass(frozen=True)
class GraphSummary:
    """What an engine computes."""

    boxes: tuple[Box, ...]
    kinds: Mapping[str, int]
    """How many operators there are of each kind, the most frequent first."""

    def to_json(self) -> dict[str, Any]:
        return {
            "operators": dict(self.kinds),
            "layers": [
                {
                    "title": box.title,
                    "bytes": box.nbytes,
                    "operators": [
                        {
                            "name": item.name,
                            "kind": item.kind,
                            "weights": list(item.weights),
                            "bytes": item.nbytes,
                            "reads": list(item.reads),
                        }
                        for item in box.operators
                    ],
                }
                for box in self.boxes
            ],
        }


def graph_summary(engine: Engine) -> GraphSummary | None:
    """The graph of an onnxruntime engine; None for a plan, which does not show its graph."""
    if engine.target != "onnxruntime":
        return None
    import onnx

    path = engine.path / ENGINE
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's own
        raise BadInputError(f"{path} is no ONNX graph: {error}", "copy the engine again or rebuild it") from None
    entries = {entry.name: entry for entry in engine.manifest.weights}
    makers = {value.name: value.name for value in graph.input}
    makers |= {name: node.name for node in graph.node for name in node.output if name}
    operators = [_operator(node, entries, makers) for node in graph.node]
    kinds = Counter(operator.kind for operator in operators)
    return GraphSummary(tuple(_boxes(operators)), dict(kinds.most_common()))


def _operator(node: Any, entries: Mapping[str, WeightEntry], makers: Mapping[str, str]) -> Operator:
    weights = tuple(name for name in node.input if name in entries)
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}."
    reads = tuple(dict.fromkeys(makers[name] for name in node.input if name in makers))
    return Operator(node.name, domain + node.op_type, weights, sum(entries[name].nbytes for name in weights), reads)


def layer_of(name: str) -> int | None:
    """The number of the layer that a node or weight belongs to, by its name; None outside of the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def _boxes(operators: Sequence[Operator]) -> list[Box]:
    """Operators by layer, in the order of the graph."""
    layers = [_layer(operator) for operator in operators]
    numbered = [place for place, layer in enumerate(layers) if layer is not None]
    boxes: dict[str, list[Operator]] = {}
    for place, (operator, layer) in enumerate(zip(operators, layers, strict=True)):
        if layer is not None:
            title = f"layer {layer}"
        elif not numbered or place < numbered[0]:
            title = "before the layers"
        else:
            title = "between the layers" if place < numbered[-1] else "behind the layers"
        boxes.setdefault(title, []).append(operator)
    return [Box(title, tuple(members)) for title, members in boxes.items()]


def _layer(operator: Operator) -> int | None:
    layers = (layer_of(name) for name in (*operator.weights, operator.name))
    return next((layer for layer in layers if layer is not None), None)
