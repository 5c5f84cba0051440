"""A pass that looks tokens up in the vocabulary's quantized head, or in a table stored as the head is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from trtllm.checkpoints.recipes import (
    TILE_BLOCK,
    Cast,
    KeptOffsets,
    KeptScales,
    KeptValues,
    QuantizedScales,
    QuantizedValues,
    Recipe,
    Source,
    TiledScales,
    TiledValues,
)
from trtllm.checkpoints.stored import Offset
from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import weight_of
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before, only_user
from trtllm.passes.lower_linear import CPU, OFFSETS
from trtllm.passes.quantize import module_bits, module_name, without_casts

_HEAD_BITS = 8


class ShareEmbedding(Pass):
    """Let the look-up of tokens read integers: those of a head with tied weights, or its own where there is none.

    y = Cast(Embedding(ids, W in float16))     becomes     y = QuantizedEmbedding(ids, V, S)

    and V, S are those of QuantizedLinear(x, V, S) where this multiplies by the same W.

    A table is rounded as the head is, to 8 bits in blocks of 32, or keeps the integers that the checkpoint has. Only
    the float16 tables of a quantized decoder are meant; a module that the build excludes keeps its table, and so do
    tables that are looked up by anything but the tokens (positions, token types), which are small.
    """

    name = "share-embedding"

    def run(self, network: Network, context: PassContext) -> int:
        if not looks_up_tiles(network, context):
            return 0
        tables = [table for node in network.graph for table in _table(node)]
        heads = {head.source: head for node in network.graph for head in _head(node)}
        count = 0
        for table in tables:
            reason = why_not(table.node, table.source, context)
            if reason:
                self.miss(context, table.node, reason)
                continue
            _look_up(network, table, heads.get(table.source), context)
            count += 1
        return count


def looks_up_tiles(network: Network, context: PassContext) -> bool:
    """Whether the target looks rows up in tiles, and the network is one whose result does not hang on each of them."""
    return context.capabilities.has("QuantizedEmbedding", CPU) and network.info.kind == "decoder"


@dataclass(frozen=True, eq=False)
class _Table:
    """A look-up in a table of float16, and its rows as float32."""

    node: ir.Node
    rows: ir.Value
    source: Source


@dataclass(frozen=True, eq=False)
class _Head:
    """A product by all rows of a table, which is in tiles."""

    source: Source
    integers: tuple[ir.Value, ir.Value, ir.Value | None]
    """Values, scales and offsets."""
    bits: int
    offset: Offset


def _table(node: ir.Node) -> Iterator[_Table]:
    weight = weight_of(node.inputs[1]) if is_dialect(node, "Embedding") else None
    wide = only_user(node.outputs[0]) if weight is not None else None
    if weight is None or wide is None or wide.op_type != "Cast" or wide.attributes["to"].value != ir.DataType.FLOAT:
        return
    source = without_casts(weight.recipe)
    if isinstance(weight.recipe, Cast) and weight.dtype == ir.DataType.FLOAT16 and type(source) is Source:
        yield _Table(node, wide.outputs[0], source)


def _head(node: ir.Node) -> Iterator[_Head]:
    weight = weight_of(node.inputs[1]) if (node.domain, node.op_type) == (CPU, "QuantizedLinear") else None
    if weight is None or not isinstance(weight.recipe, TiledValues):
        return
    values, offset = weight.recipe.of, attributes_of(node).get("offset", 0)
    is_kept = isinstance(values, KeptValues)
    if not isinstance(values, KeptValues | QuantizedValues) or not (is_kept or values.bits == _HEAD_BITS):
        return
    if type(values.of) is Source:
        kind = next(kind for kind, number in OFFSETS.items() if number == offset) if offset else Offset.NONE.value
        offsets = node.inputs[4] if offset else None
        assert node.inputs[1] is not None and node.inputs[2] is not None
        yield _Head(values.of, (node.inputs[1], node.inputs[2], offsets), values.bits, Offset(kind))


def why_not(node: ir.Node, source: Source, context: PassContext) -> str:
    """Why the table of an Embedding, made of `source`, keeps its values; empty when it becomes integers."""
    if node.inputs[0] is None or node.inputs[0].name != "input_ids":
        return "it is not looked up by tokens"
    if source.shape[-1] % TILE_BLOCK:
        return f"{source.shape[-1]} columns are no multiple of {TILE_BLOCK}"
    if context.build.quantization is not None:
        treated = module_bits(context.build, module_name(source.name), is_head=True)
        return "" if treated is not None else "the build keeps it in full precision"
    stored = context.stored.get(source.name)
    return "" if stored is not None and (stored.integers or stored.coarse) else "the checkpoint holds no integers of it"


def _look_up(network: Network, table: _Table, head: _Head | None, context: PassContext) -> None:
    b = builder_before(network, table.node)
    b.scope = ""
    if head is None:
        stem = table.source.name
        bits, offset, recipes = _own_recipes(table.source, context)
        endings = ("values", "scales", "offsets")
        integers = [b.weight(f"{stem}_{end}_tiles", made) for end, made in zip(endings, recipes, strict=False)]
    else:
        bits, offset, integers = head.bits, head.offset, [value for value in head.integers if value is not None]
    extents, ids = table.source.shape, table.node.inputs[0]
    assert ids is not None
    y = b.op(
        "QuantizedEmbedding",
        [ids, *integers],
        (*dims(ids), extents[1]),
        ir.DataType.FLOAT,
        domain=CPU,
        name=table.node.name or "embedding",
        N=extents[0],
        K=extents[1],
        bits=bits,
        offset=OFFSETS.get(offset.value, 0),
    )
    wide = table.rows.producer()
    assert wide is not None
    table.rows.replace_all_uses_with(y)
    network.graph.remove([wide, table.node], safe=True)


def _own_recipes(source: Source, context: PassContext) -> tuple[int, Offset, tuple[Recipe, ...]]:
    """Bits, offset and the recipes of values, scales and perhaps offsets of a table that no head shares."""
    stored = context.stored.get(source.name) if context.build.quantization is None else None
    form = stored.integers if stored is not None else None
    if form is None:
        details = (source, _HEAD_BITS, TILE_BLOCK, DType.FLOAT16)
        made = TiledValues(QuantizedValues(*details)), TiledScales(QuantizedScales(*details))
        return _HEAD_BITS, Offset.NONE, made
    kept = (
        TiledValues(KeptValues(source, form.bits, form.offset.value)),
        TiledScales(KeptScales(source, TILE_BLOCK)),
    )
    if form.offset is Offset.NONE:
        return form.bits, form.offset, kept
    offsets = KeptOffsets(source, form.bits, form.offset.value, TILE_BLOCK)
    return form.bits, form.offset, (*kept, TiledScales(offsets))
