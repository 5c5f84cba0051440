"""What each dialect operator computes, in standard ONNX operators (opset 24).

A body appends nodes through a builder and returns the results. A target that lacks an operator gets its body; tests
run it. Values may be of any float type; sums of squares and softmaxes are in float32 inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.builder import GraphBuilder, dims, dtype_of
from trtllm.compiler.ir.scaled_reference import scaled_linear
from trtllm.compiler.ir.weights import DTYPES
from trtllm.dtypes import DType

Inputs = list[ir.Value]
Body = Callable[[GraphBuilder, Inputs, Mapping[str, Any]], list[ir.Value]]

I64 = DType.INT64
F32 = DType.FLOAT32


def _embedding(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    ids, weight = x
    rows = b.op("Gather", [weight, ids], (*dims(ids), dims(weight)[1]), dtype_of(weight), axis=0)
    return [rows if a["scale"] == 1.0 else b.op("Mul", [rows, _like(b, a["scale"], rows)])]


def _linear(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    out_features, in_features = dims(x[1])
    transposed = b.op("Transpose", [x[1]], (in_features, out_features), perm=[1, 0])
    y = b.op("MatMul", [x[0], transposed], (*dims(x[0])[:-1], out_features))
    return [b.op("Add", [y, x[2]]) if len(x) > 2 else y]


def _rms_norm(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    return [b.op("RMSNormalization", x, axis=-1, epsilon=a["epsilon"])]


def _layer_norm(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    return [b.op("LayerNormalization", x, axis=-1, epsilon=a["epsilon"])]


def _add_rms_norm(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    total = b.op("Add", x[:2])
    return [*_rms_norm(b, [total, x[2]], a), total]


def _add_layer_norm(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    total = b.op("Add", x[:2])
    return [*_layer_norm(b, [total, *x[2:]], a), total]


def _positions(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    ids, past_lengths = x
    batch, sequence, *_ = dims(ids)
    steps = _counting(b, ids, 1)
    column = b.op("Unsqueeze", [past_lengths, b.constant([1])], (batch, 1), I64)
    return [b.op("Add", [column, steps], (batch, sequence), I64)]


def _counting(b: GraphBuilder, x: ir.Value, axis: int) -> ir.Value:
    """int64 0, 1, ... up to the extent of an axis of x."""
    extent = b.op("Shape", [x], (1,), I64, start=axis, end=axis + 1)
    extent = b.op("Squeeze", [extent, b.constant([0])], (), I64)
    return b.op("Range", [b.constant(0), extent, b.constant(1)], (dims(x)[axis],), I64)


def _rotary(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    return [b.op("RotaryEmbedding", x, num_heads=a["num_heads"], rotary_embedding_dim=_partial(x[0], a), interleaved=0)]


def _partial(x: ir.Value, a: Mapping[str, Any]) -> int:
    """onnx counts a full rotation as rotary_embedding_dim 0."""
    head_size = int(dims(x)[-1]) // a["num_heads"]
    return 0 if a["rotary_size"] == head_size else int(a["rotary_size"])


def _head_rms_norm(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    batch, sequence, width = dims(x[0])
    heads = a["num_heads"]
    split = b.op("Reshape", [x[0], b.constant([0, 0, heads, -1])], (batch, sequence, heads, int(width) // heads))
    normed = _rms_norm(b, [split, x[1]], a)[0]
    return [b.op("Reshape", [normed, b.constant([0, 0, -1])], (batch, sequence, width))]


def _attention(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    query, key, value, past_key, past_value, past_lengths, _ = x
    present_key = _scatter(b, past_key, key, past_lengths, a)
    present_value = _scatter(b, past_value, value, past_lengths, a)
    mask = causal_mask(b, query, past_key, past_lengths, a["window"])
    y = _attend(b, query, present_key, present_value, mask, a)
    return [y, present_key, present_value]


def _scatter(b: GraphBuilder, past: ir.Value, new: ir.Value, past_lengths: ir.Value, a: Mapping[str, Any]) -> ir.Value:
    rows = _heads(b, new, a["num_kv_heads"], a["head_size"])
    return b.op("TensorScatter", [past, rows, past_lengths], axis=2, mode="linear")


def _heads(b: GraphBuilder, x: ir.Value, heads: int, head_size: int) -> ir.Value:
    """[B, S, heads*D] as [B, heads, S, D]."""
    batch, sequence, _ = dims(x)
    split = b.op("Reshape", [x, b.constant([0, 0, heads, head_size])], (batch, sequence, heads, head_size))
    return b.op("Transpose", [split], (batch, heads, sequence, head_size), perm=[0, 2, 1, 3])


def causal_mask(b: GraphBuilder, query: ir.Value, cache: ir.Value, past_lengths: ir.Value, window: int) -> ir.Value:
    """bool [B, 1, S, T]: cache row j is visible to new token s of row b."""
    batch, sequence, _ = dims(query)
    capacity = dims(cache)[2]
    positions = _query_positions(b, query, past_lengths)
    slots = _counting(b, cache, 2)
    visible = b.op("LessOrEqual", [slots, positions], (batch, 1, sequence, capacity), DType.BOOL)
    if window > 0:
        oldest = b.op("Sub", [positions, b.constant(window)])
        recent = b.op("Greater", [slots, oldest], (batch, 1, sequence, capacity), DType.BOOL)
        visible = b.op("And", [visible, recent])
    return visible


def _query_positions(b: GraphBuilder, query: ir.Value, past_lengths: ir.Value) -> ir.Value:
    """int64 [B, 1, S, 1]: the absolute position of each new token."""
    batch, sequence, _ = dims(query)
    positions = _positions(b, [query, past_lengths], {})[0]
    return b.op("Unsqueeze", [positions, b.constant([1, 3])], (batch, 1, sequence, 1), I64)


def _attend(
    b: GraphBuilder, query: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value, a: Mapping[str, Any]
) -> ir.Value:
    """Standard attention of query [B, S, Q*D] over key and value [B, G, T, D]."""
    batch, sequence, width = dims(query)
    split = _heads(b, query, a["num_heads"], a["head_size"])
    y = b.op("Attention", [split, key, value, mask], scale=a["scale"], softcap=a.get("softcap", 0.0))
    y = b.op("Transpose", [y], (batch, sequence, a["num_heads"], a["head_size"]), perm=[0, 2, 1, 3])
    return b.op("Reshape", [y, b.constant([0, 0, -1])], (batch, sequence, width))


def _encoder_attention(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    query, key, value, lengths = x
    keys = _heads(b, key, a["num_heads"], a["head_size"])
    values = _heads(b, value, a["num_heads"], a["head_size"])
    valid = valid_tokens(b, query, lengths)
    batch, sequence = dims(valid)
    mask = b.op("Unsqueeze", [valid, b.constant([1, 2])], (batch, 1, 1, sequence), DType.BOOL)
    square = b.op("Shape", [query], (1,), I64, start=1, end=2)
    shape = b.op("Concat", [b.constant([1, 1]), square, b.constant([1])], (4,), I64, axis=0)
    mask = b.op("Expand", [mask, shape], (batch, 1, sequence, sequence), DType.BOOL)
    return [_attend(b, query, keys, values, mask, a)]


def valid_tokens(b: GraphBuilder, x: ir.Value, lengths: ir.Value) -> ir.Value:
    """bool [B, S]: token s of row b is not padding."""
    batch, sequence, *_ = dims(x)
    steps = _counting(b, x, 1)
    column = b.op("Unsqueeze", [lengths, b.constant([1])], (batch, 1), I64)
    return b.op("Less", [steps, column], (batch, sequence), DType.BOOL)


def _activation(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    match a["kind"]:
        case "silu":
            return [b.op("Mul", [x[0], b.op("Sigmoid", [x[0]])])]
        case "gelu":
            return [b.op("Gelu", [x[0]], approximate="none")]
        case "gelu_tanh":
            return [b.op("Gelu", [x[0]], approximate="tanh")]
        case kind:
            return [b.op({"relu": "Relu", "tanh": "Tanh"}[kind], [x[0]])]


def _gated_activation(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    if len(x) == 1:
        half = int(dims(x[0])[-1]) // 2
        x = _split(b, x, {"sizes": [half, half]})
    return [b.op("Mul", [*_activation(b, x[:1], a), x[1]])]


def _moe(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    """Every expert on every token, weighted by the routing: exact, and dense in cost."""
    hidden, logits, gate_up, down = x
    experts, double_width, width = dims(gate_up)
    tokens = b.op("Reshape", [hidden, b.constant([1, -1, int(width)])], (1, "tokens", width))
    routing = routing_weights(b, logits, a)
    packed = b.op(
        "MatMul",
        [tokens, b.op("Transpose", [gate_up], (experts, width, double_width), perm=[0, 2, 1])],
        (experts, "tokens", double_width),
    )
    inner = _gated_activation(b, [packed], a)[0]
    outer = b.op(
        "MatMul",
        [inner, b.op("Transpose", [down], (experts, int(double_width) // 2, width), perm=[0, 2, 1])],
        (experts, "tokens", width),
    )
    weighted = b.op("Mul", [outer, routing])
    total = b.op("ReduceSum", [weighted, b.constant([0])], ("tokens", width), keepdims=0)
    shape = b.op("Shape", [hidden], (3,), I64)
    return [b.op("Reshape", [total, shape], dims(hidden))]


def routing_weights(b: GraphBuilder, logits: ir.Value, a: Mapping[str, Any]) -> ir.Value:
    """The weight of each expert for each token, zero where not chosen: [E, tokens, 1]."""
    experts = int(dims(logits)[-1])
    flat = b.op("Reshape", [logits, b.constant([-1, experts])], ("tokens", experts))
    scores = b.op("Softmax", [b.op("Cast", [flat], None, F32, to=ir.DataType.FLOAT)], axis=-1)
    top_k = int(a["top_k"])
    best, chosen = b.multi(
        "TopK", [scores, b.constant([top_k])], [(("tokens", top_k), F32), (("tokens", top_k), I64)], axis=-1
    )
    if a["normalize"]:
        best = b.op("Div", [best, b.op("ReduceSum", [best, b.constant([-1])], ("tokens", 1), keepdims=1)])
    zeros = b.op("Mul", [scores, b.constant(0.0, F32)])
    spread = b.op("ScatterElements", [zeros, chosen, best], axis=-1)
    spread = b.op("Cast", [spread], None, dtype_of(logits), to=dtype_of(logits))
    turned = b.op("Transpose", [spread], (experts, "tokens"), perm=[1, 0])
    return b.op("Unsqueeze", [turned, b.constant([2])], (experts, "tokens", 1))


def _split(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    lead = dims(x[0])[:-1]
    sizes = [int(size) for size in a["sizes"]]
    return b.multi("Split", [x[0], b.constant(sizes)], [((*lead, size), None) for size in sizes], axis=-1)


def _select_tokens(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    states, lengths = x
    batch, _, width = dims(states)
    last = b.op("Sub", [lengths, b.constant(1)])
    index = b.op("Unsqueeze", [last, b.constant([1, 2])], (batch, 1, 1), I64)
    shape = b.op("Concat", [b.op("Shape", [lengths], (1,), I64), b.constant([1, int(width)])], (3,), I64, axis=0)
    index = b.op("Expand", [index, shape], (batch, 1, width), I64)
    return [b.op("GatherElements", [states, index], (batch, 1, width), axis=1)]


def _logits_head(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    y = _linear(b, x, {})[0]
    if dtype_of(y) != ir.DataType.FLOAT:
        y = b.op("Cast", [y], None, F32, to=ir.DataType.FLOAT)
    return [head_epilogue(b, y, a)]


def head_epilogue(b: GraphBuilder, logits: ir.Value, a: Mapping[str, Any]) -> ir.Value:
    """Scale and softcap of float32 logits."""
    if a["scale"] != 1.0:
        logits = b.op("Mul", [logits, b.constant(a["scale"], F32)])
    if a["softcap"] > 0.0:
        cap = b.constant(a["softcap"], F32)
        logits = b.op("Mul", [b.op("Tanh", [b.op("Div", [logits, cap])]), cap])
    return logits


def _pool(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    states, lengths = x
    batch, _, width = dims(states)
    if dtype_of(states) != ir.DataType.FLOAT:
        states = b.op("Cast", [states], None, F32, to=ir.DataType.FLOAT)
    match a["kind"]:
        case "mean":
            pooled = _mean_of_valid(b, states, lengths)
        case "cls":
            pooled = b.op("Gather", [states, b.constant(0)], (batch, width), axis=1)
        case _:
            last = _select_tokens(b, [states, lengths], {})[0]
            pooled = b.op("Squeeze", [last, b.constant([1])], (batch, width))
    if a["normalize"]:
        norm = b.op("ReduceL2", [pooled, b.constant([1])], (batch, 1), keepdims=1)
        pooled = b.op("Div", [pooled, b.op("Max", [norm, b.constant(1e-12, F32)])])
    return [pooled]


def _mean_of_valid(b: GraphBuilder, states: ir.Value, lengths: ir.Value) -> ir.Value:
    batch, sequence, width = dims(states)
    valid = valid_tokens(b, states, lengths)
    column = b.op("Unsqueeze", [valid, b.constant([2])], (batch, sequence, 1), DType.BOOL)
    kept = b.op("Where", [column, states, b.constant(0.0, F32)], dims(states), F32)
    total = b.op("ReduceSum", [kept, b.constant([1])], (batch, width), keepdims=0)
    count = b.op("Cast", [lengths], None, F32, to=ir.DataType.FLOAT)
    return b.op("Div", [total, b.op("Unsqueeze", [count, b.constant([1])], (batch, 1))])


def _dequantize_blocks(b: GraphBuilder, x: Inputs, a: Mapping[str, Any]) -> list[ir.Value]:
    values, scales, offsets = x
    rows, columns = dims(values)
    dtype = dtype_of(scales)
    integers = b.op("Cast", [values], None, dtype, to=dtype)
    if dtype_of(values) == ir.DataType.INT4:
        integers = b.op("Add", [integers, b.constant(8, DTYPES[dtype])])
    blocks = (rows, *dims(scales)[1:], a["block_size"])
    integers = b.op("Reshape", [integers, b.constant([int(extent) for extent in blocks])], blocks)
    scales, offsets = (
        b.op("Unsqueeze", [b.op("Cast", [value], None, dtype, to=dtype), b.constant([2])], (*dims(value), 1))
        for value in (scales, offsets)
    )
    if a["offset"] == "zero_point":
        weights = b.op("Mul", [b.op("Sub", [integers, offsets]), scales])
    else:
        weights = b.op("Add", [b.op("Mul", [integers, scales]), offsets])
    return [b.op("Reshape", [weights, b.constant([int(rows), int(columns)])], (rows, columns))]


def _like(b: GraphBuilder, number: float, value: ir.Value) -> ir.Value:
    """A scalar constant of the value's float type."""
    return b.constant(number, DTYPES[dtype_of(value)])


BODIES: Mapping[str, Body] = {
    "Embedding": _embedding,
    "Linear": _linear,
    "ScaledLinear": scaled_linear,
    "RMSNorm": _rms_norm,
    "LayerNorm": _layer_norm,
    "AddRMSNorm": _add_rms_norm,
    "AddLayerNorm": _add_layer_norm,
    "Positions": _positions,
    "Rotary": _rotary,
    "HeadRMSNorm": _head_rms_norm,
    "Attention": _attention,
    "EncoderAttention": _encoder_attention,
    "Activation": _activation,
    "GatedActivation": _gated_activation,
    "MoE": _moe,
    "Split": _split,
    "SelectTokens": _select_tokens,
    "DequantizeBlocks": _dequantize_blocks,
    "LogitsHead": _logits_head,
    "Pool": _pool,
}
