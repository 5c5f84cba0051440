"""A pass that maps cached attention to a target's fused operator, where it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.builder import GraphBuilder, dims
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before, only_user, replace

MICROSOFT = "com.microsoft"


@dataclass(frozen=True, eq=False)
class _Rotation:
    """Rotary tables that depend on the position alone, and the rotation's inputs."""

    query: ir.Value
    key: ir.Value
    cos: ir.Value
    sin: ir.Value


class LowerAttention(Pass):
    """Replace Attention by GroupQueryAttention with one cache buffer for past and present.

    q, k, v = Split(qkv); y, K', V' = Attention(Rotary(q), Rotary(k), v, K, V, ...)
        becomes
    y, K', V' = GroupQueryAttention(qkv, , , K, V, seqlens, total, cos, sin)

    Rotation moves inside when its tables are constants of the position; packing stays when q, k and v are one Split.
    Head norms stay outside: the operator's own are refused by its CPU kernel (onnxruntime 1.32).
    A batch of several new tokens a row is right for rows that all start at position 0, or for one row alone; the
    session steps accordingly.
    """

    name = "lower-attention"

    def run(self, network: Network, context: PassContext) -> int:
        if not context.capabilities.has("GroupQueryAttention", MICROSOFT):
            return 0
        nodes = [node for node in network.graph if is_dialect(node, "Attention")]
        lengths: tuple[ir.Value, ir.Value] | None = None
        for node in nodes:  # those that no other pass has lowered
            lengths = lengths or _lengths(builder_before(network, node), node)
            self._lower(network, node, lengths, context)
        return len(nodes)

    def _lower(self, network: Network, node: ir.Node, lengths: tuple[ir.Value, ir.Value], context: PassContext) -> None:
        a = attributes_of(node)
        b = builder_before(network, node)
        query, key, value, past_key, past_value = (_value(node, index) for index in range(5))
        rotation = _rotation(query, key, a)
        if rotation is None:
            self.miss(context, node, "rotation stays outside: the operator takes no such angles or width")
        else:
            query, key = rotation.query, rotation.key
        packed = packed_projection(query, key, value)
        if packed is None:
            self.miss(context, node, "query, key and value stay apart: they are not one Split")
        operands = [packed, None, None] if packed is not None else [query, key, value]
        tables = [rotation.cos, rotation.sin] if rotation is not None else [None, None]
        results = b.multi(
            "GroupQueryAttention",
            [*operands, past_key, past_value, *lengths, *tables],
            [(dims(node.outputs[0]), query.dtype), (dims(past_key), None), (dims(past_value), None)],
            domain=MICROSOFT,
            name="gqa",
            num_heads=a["num_heads"],
            kv_num_heads=a["num_kv_heads"],
            scale=a["scale"],
            softcap=a["softcap"],
            local_window_size=a["window"] or -1,
            do_rotary=int(rotation is not None),
            rotary_interleaved=0,
        )
        for result in results[1:]:
            result.type = ir.TensorType(past_key.dtype)  # type: ignore[arg-type]
        results[0].type = ir.TensorType(query.dtype)  # type: ignore[arg-type]
        replace(node, results)


def _value(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _lengths(b: GraphBuilder, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """int32 last valid cache row of each sequence [B], and int32 longest total length, a scalar."""
    query, past, new = _value(node, 0), _value(node, 5), _value(node, 6)
    b.scope = "attention/"
    last = b.op("Sub", [b.op("Add", [past, new]), b.constant(1)])
    last = b.op("Cast", [last], None, DType.INT32, to=ir.DataType.INT32, name="last_rows")
    step = b.op(
        "Squeeze", [b.op("Shape", [query], (1,), DType.INT64, start=1, end=2), b.constant([0])], (), DType.INT64
    )
    longest = b.op("ReduceMax", [past], (), keepdims=0)
    total = b.op("Add", [longest, step], ())
    return last, b.op("Cast", [total], (), DType.INT32, to=ir.DataType.INT32, name="total_length")


def _rotation(query: ir.Value, key: ir.Value, a: dict[str, Any]) -> _Rotation | None:
    """The rotation, if the operator can do it: tables by position, heads of 16n elements of which 16n turn."""
    nodes = [query.producer(), key.producer()]
    if any(node is None or not is_dialect(node, "Rotary") for node in nodes) or a["head_size"] % 16:
        return None
    first, second = (node for node in nodes if node is not None)
    tables = [rotary_table(first.inputs[index]) for index in (1, 2)]
    if any(first.inputs[i] is not second.inputs[i] for i in (1, 2)) or None in tables:
        return None
    cos, sin = (table for table in tables if table is not None)
    if int(dims(cos)[1]) % 8:
        return None
    return _Rotation(_value(first, 0), _value(second, 0), cos, sin)


def rotary_table(value: ir.Value | None) -> ir.Value | None:
    """The constant table [capacity, R/2] behind Gather(table, Positions(...))."""
    gather = value.producer() if value is not None else None
    if gather is None or gather.op_type != "Gather":
        return None
    table, positions = gather.inputs
    producer = positions.producer() if positions is not None else None
    if table is None or table.const_value is None or producer is None or not is_dialect(producer, "Positions"):
        return None
    return table


def packed_projection(query: ir.Value, key: ir.Value, value: ir.Value | None) -> ir.Value | None:
    """The value whose Split gives exactly these three, each read once."""
    split = query.producer()
    if split is None or not is_dialect(split, "Split") or list(split.outputs) != [query, key, value]:
        return None
    if any(only_user(part) is None for part in split.outputs):
        return None
    return split.inputs[0]
