"""A pass that turns a decoder of padded rows into one of packed tokens over a cache of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from trtllm.compiler.ir.builder import GraphBuilder, dims
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.network import CacheGroup, Network
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before, replace
from trtllm.passes.lower_cached_attention import CPU, FusedAttention, fused_attention

SYMBOLS: Mapping[str, int | str] = {"batch": 1, "sequence": "tokens"}
"""What the extents of a padded graph become."""


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Graph inputs of a packed step."""

    positions: ir.Value
    row_starts: ir.Value
    logits_indices: ir.Value
    tables: tuple[ir.Value, ...]
    """One for each cache group."""


class PackTokens(Pass):
    """Let one step take any number of new tokens of any rows, whose keys and values lie in blocks.

    input_ids [B, S], past_lengths [B], lengths [B], past_key.N [B, G, T, D]
    p = Positions(input_ids, past_lengths)
    y, K', V' = Attention(Rotary(q), Rotary(k), v, K, V, past_lengths, lengths)
    logits = LogitsHead(SelectTokens(x, lengths))
        becomes
    input_ids and positions [1, tokens], row_starts [rows + 1], past_lengths [rows], logits_indices [N],
    block_table.M [rows, columns] of each group of layers with one window, past_key.N [blocks, G, block size, D]
    y, K', V' = PagedAttention(qkv, K, V, row_starts, past_lengths, block_table.M, cos, sin, wq, wk)
    logits = LogitsHead(Gather(x, logits_indices))

    All or nothing: it needs every attention in a form that the kernel takes, and lengths that nothing else reads.
    """

    name = "pack-tokens"

    def run(self, network: Network, context: PassContext) -> int:
        nodes = [node for node in network.graph if is_dialect(node, "Attention")]
        if not nodes or not context.capabilities.has("PagedAttention", CPU):
            return 0
        fused = [fused_attention(node) for node in nodes]
        taken = [one for one in fused if isinstance(one, FusedAttention)]
        for node, one in zip(nodes, fused, strict=True):
            if isinstance(one, str):
                self.miss(context, node, one)
        reader = _other_reader(network)
        if reader is not None:
            self.miss(context, reader, "it depends on the rows' lengths")
        if reader is not None or len(taken) < len(nodes):
            return 0
        network.cache_groups = cache_groups(network)
        _pack(network, list(zip(nodes, taken, strict=True)))
        return len(nodes)


def cache_groups(network: Network) -> tuple[CacheGroup, ...]:
    """The layers by window, in order of first appearance."""
    layers: dict[int, list[int]] = {}
    for index, layer in enumerate(network.info.cache):
        layers.setdefault(layer.window, []).append(index)
    return tuple(CacheGroup(window, tuple(indices)) for window, indices in layers.items())


def _other_reader(network: Network) -> ir.Node | None:
    """A node that reads the rows' lengths and has no packed form."""
    for value in network.graph.inputs:
        if value.name in ("past_lengths", "lengths"):
            for use in value.uses():
                if not is_dialect(use.node, "Attention", "Positions", "SelectTokens"):
                    return use.node
    return None


def _pack(network: Network, attentions: list[tuple[ir.Node, FusedAttention]]) -> None:
    inputs = _replace_inputs(network)
    for node in list(network.graph):
        for value in node.outputs:
            if value.shape is not None:
                value.shape = _packed_shape(value)
        if is_dialect(node, "Positions"):
            replace(node, [inputs.positions])
    table_of = {
        layer: table for group, table in zip(network.cache_groups, inputs.tables, strict=True) for layer in group.layers
    }
    for index, (node, fused) in enumerate(attentions):
        _page(network, node, fused, inputs, table_of[index])
    for head in [node for node in network.graph if is_dialect(node, "LogitsHead")]:
        _choose_logits(network, head, inputs.logits_indices)
    lengths = next(value for value in network.graph.inputs if value.name == "lengths")
    network.graph.inputs.remove(lengths)


def _packed_shape(value: ir.Value) -> ir.Shape:
    return ir.Shape([SYMBOLS.get(extent, extent) if isinstance(extent, str) else extent for extent in dims(value)])


def _replace_inputs(network: Network) -> _Inputs:
    """Gives the graph its packed inputs; `lengths` stays until nothing reads it."""
    graph = network.graph
    given = {value.name or "": value for value in graph.inputs}
    given["input_ids"].shape = ir.Shape([1, "tokens"])
    given["past_lengths"].shape = ir.Shape(["row_count"])
    for name, value in given.items():
        if name.startswith(("past_key.", "past_value.")):
            _, heads, _, size = dims(value)
            value.shape = ir.Shape(["blocks", heads, "tokens_per_block", size])
    b = GraphBuilder(graph)
    made = _Inputs(
        b.input("positions", DType.INT64, (1, "tokens")),
        b.input("row_starts", DType.INT64, ("row_bounds",)),
        b.input("logits_indices", DType.INT64, ("chosen",)),
        tuple(
            b.input(f"block_table.{index}", DType.INT32, ("row_count", f"columns.{index}"))
            for index in range(len(network.cache_groups))
        ),
    )
    first = [given["input_ids"], made.positions, made.row_starts, given["past_lengths"], made.logits_indices]
    first += made.tables
    rest = [value for value in graph.inputs if value not in first]
    graph.inputs.clear()
    graph.inputs.extend([*first, *rest])
    return made


def _page(network: Network, node: ir.Node, fused: FusedAttention, inputs: _Inputs, table: ir.Value) -> None:
    key, value, past_lengths = node.inputs[3:6]
    assert key is not None and value is not None
    results = builder_before(network, node).multi(
        "PagedAttention",
        [fused.packed, key, value, inputs.row_starts, past_lengths, table, *fused.optional_inputs],
        [(dims(node.outputs[0]), node.outputs[0].dtype), (dims(key), key.dtype), (dims(value), value.dtype)],
        domain=CPU,
        name="paged",
        **fused.attributes,
    )
    replace(node, results)


def _choose_logits(network: Network, head: ir.Node, indices: ir.Value) -> None:
    """Lets the head see the chosen tokens only, whatever the padded graph chose."""
    states = head.inputs[0]
    assert states is not None
    producer = states.producer()
    selecting = producer is not None and is_dialect(producer, "SelectTokens")
    source = producer.inputs[0] if producer is not None and selecting else states
    assert source is not None
    shape = (1, "chosen", dims(source)[-1])
    chosen = builder_before(network, head).op("Gather", [source, indices], shape, name="chosen", axis=1)
    head.replace_input_with(0, chosen)
    if producer is not None and selecting and not states.uses():
        network.graph.remove(producer, safe=True)
    head.outputs[0].shape = ir.Shape([1, "chosen", dims(head.outputs[0])[-1]])
