"""Cuts a decoder's graph where a single value carries everything onward, so that a few layers run at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtllm.compiler.ir.builder import OPSET
from trtllm.compiler.ir.dialect import DOMAIN, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import Weight, weight_of


@dataclass(frozen=True, eq=False)
class Segment:
    """Nodes between two cuts, and those that they need beside the stream of states."""

    entry: ir.Value | None
    """The states that come in [B, S, H]; None in the first segment, which reads the tokens."""
    exit: ir.Value
    """The states that go on."""
    nodes: tuple[ir.Node, ...]

    @property
    def linears(self) -> tuple[ir.Node, ...]:
        """Linear layers whose weight is a weight of the model."""
        found = (node for node in self.nodes if is_dialect(node, "Linear"))
        return tuple(node for node in found if weight_of(node.inputs[1]) is not None)


def segments(network: Network) -> list[Segment]:
    """The segments in order. Each holds a linear layer; what follows the last one (norm and head) is in none."""
    nodes = list(network.graph)
    stream = _stream(nodes)
    last_use = {value: index for index, node in enumerate(nodes) for value in node.inputs if value in stream}
    found: list[Segment] = []
    live: set[ir.Value] = set()
    entry, begin = None, 0
    for index, node in enumerate(nodes):
        live |= {value for value in node.outputs if value in stream and last_use.get(value, -1) > index}
        live -= {value for value in live if last_use[value] <= index}
        part = nodes[begin : index + 1]
        if len(live) != 1 or not any(is_dialect(item, "Linear") for item in part):
            continue
        (exit_value,) = live
        own = [item for item in part if any(value in stream for value in item.outputs)]
        found.append(Segment(entry, exit_value, tuple(_with_sources(nodes, own, stream))))
        entry, begin = exit_value, index + 1
    return found


def _stream(nodes: list[ir.Node]) -> set[ir.Value]:
    """Everything computed from the embedded tokens; the cache that an attention gives back is not part of it."""
    stream: set[ir.Value] = set()
    for node in nodes:
        if is_dialect(node, "Embedding") or any(value in stream for value in node.inputs):
            stream |= {value for value in node.outputs if not value.is_graph_output()}
    return stream


def _with_sources(nodes: list[ir.Node], own: list[ir.Node], stream: set[ir.Value]) -> list[ir.Node]:
    """The segment's nodes and those that make their positions and tables, in the graph's order."""
    wanted, stack = set(own), list(own)
    while stack:
        for value in stack.pop().inputs:
            producer = value.producer() if value is not None and value not in stream else None
            if producer is not None and producer not in wanted:
                wanted.add(producer)
                stack.append(producer)
    return [node for node in nodes if node in wanted]


def subgraph(network: Network, segment: Segment, outputs: list[ir.Value]) -> tuple[Network, dict[str, Weight]]:
    """A segment as a network of its own, and the weights that are inputs of it, by name.

    Weights are inputs so that the same graph runs with any, and is small however large they are.
    """
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name="segment")
    copies: dict[ir.Value, ir.Value] = {}
    weights: dict[str, Weight] = {}

    def copy_of(value: ir.Value) -> ir.Value:
        if value in copies:
            return copies[value]
        copies[value] = made = ir.Value(name=value.name, shape=value.shape, type=value.type)
        weight = weight_of(value)
        if value.const_value is not None and weight is None:
            made.const_value = value.const_value
            graph.register_initializer(made)
            return made
        if weight is not None:
            weights[value.name or ""] = weight
        graph.inputs.append(made)
        return made

    if segment.entry is not None:
        copy_of(segment.entry)
    for node in segment.nodes:
        inputs = [None if value is None else copy_of(value) for value in node.inputs]
        clone = ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()), name=node.name,
            num_outputs=len(node.outputs),
        )  # fmt: skip
        for old, new in zip(node.outputs, clone.outputs, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            copies[old] = new
        graph.append(clone)
    graph.outputs.extend(copies[value] for value in outputs)
    return Network(ir.Model(graph, ir_version=network.model.ir_version), network.info), weights


def segment_feeds(
    network: Network, segment: Segment, tokens: np.ndarray, states: np.ndarray | None
) -> dict[str, np.ndarray]:
    """What a segment's graph reads beside weights: tokens int64 [B, S] or states [B, S, H], and an empty cache."""
    rows, length = tokens.shape
    feeds = {
        "input_ids": tokens,
        "past_lengths": np.zeros(rows, np.int64),
        "lengths": np.full(rows, length, np.int64),
    }
    for index, layer in enumerate(network.info.cache):
        empty = np.zeros((rows, layer.num_kv_heads, length, layer.head_size), np.float32)
        feeds |= {f"past_key.{index}": empty, f"past_value.{index}": empty}
    if segment.entry is not None:
        assert states is not None
        feeds[segment.entry.name or ""] = states
    return feeds
