"""A pass that reads the key-value cache through block tables, for engines that extend none in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trtllm.compiler.ir.builder import GraphBuilder, dims, dtype_of
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import DTYPES
from trtllm.config import BuildConfig
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before, replace
from trtllm.passes.decompose_attention import HIDDEN_SCORE

F32, I64, I32 = DType.FLOAT32, DType.INT64, DType.INT32
COLUMNS = "columns"
"""The extent of the block table along a row's blocks."""


class GatherCache(Pass):
    """Attend to the gathered past and to the new tokens apart, under one softmax; hand only the new rows out.

    y, K', V' = Attention(q, k, v, K [B, G, T, D], V, past_lengths, lengths)
        becomes, with K [blocks, G, tokens of a block, D] and block_table int32 [B, columns]
    past = Gather(K, block_table)
    s = q past' where a row holds tokens;  t = q k' where a token is not later;  p, r = Softmax(s joined t)
    y = p past_values + r v;  present_key [B, S, G, D] = k

    Query heads that share a key head are rows of one product, so that a key is read once. Scores and sums of
    exponentials are float32. A row of the cache that holds no token is multiplied by zero: it must be finite.

    Of the logits only those of a row's last token are computed, with the best of them (candidate_values [B, C],
    candidate_indices) and log_sum_exp [B]; a build that gathers context logits has all of them and no candidates.
    """

    name = "gather-cache"

    def run(self, network: Network, context: PassContext) -> int:
        nodes = [node for node in network.graph if is_dialect(node, "Attention")]
        if not nodes or not context.capabilities.gathers_cache:
            return 0
        given = {value.name or "": value for value in network.graph.inputs}
        table = _replace_inputs(network, context.build)
        for node in nodes:
            _attend(network, node, table)
        for head in [node for node in network.graph if is_dialect(node, "LogitsHead")]:
            _choose_logits(network, head, given, context.build)
        return len(nodes)


def cache_blocks(build: BuildConfig) -> int:
    """Blocks of the cache: those of max_batch_size of the longest sequences, and half as many for reuse."""
    assert build.max_seq_len is not None
    needed = build.max_batch_size * -(-build.max_seq_len // build.tensorrt_tokens_per_block)
    return build.tensorrt_cache_blocks or needed + needed // 2


def _replace_inputs(network: Network, build: BuildConfig) -> ir.Value:
    """Gives caches their blocks; returns the block table."""
    graph, blocks = network.graph, cache_blocks(build)
    for value in graph.inputs:
        if (value.name or "").startswith(("past_key.", "past_value.")):
            _, heads, _, size = dims(value)
            value.shape = ir.Shape([blocks, heads, build.tensorrt_tokens_per_block, size])
    table = GraphBuilder(graph).input("block_table", I32, ("batch", COLUMNS))
    first = [
        value for value in graph.inputs if not (value.name or "").startswith("past_") or value.name == "past_lengths"
    ]
    rest = [value for value in graph.inputs if value not in first]
    graph.inputs.clear()
    graph.inputs.extend([*first, *rest])
    return table


def _attend(network: Network, node: ir.Node, table: ir.Value) -> None:
    a, b = attributes_of(node), builder_before(network, node)
    query, key, value, past_key, past_value, past_lengths = (_input(node, index) for index in range(6))
    batch, sequence, width = dims(query)
    groups, size = int(a["num_kv_heads"]), int(a["head_size"])
    repeats = int(a["num_heads"]) // groups
    rows = _query_rows(b, query, groups, repeats, size, a["scale"])
    new_key, new_value = (_heads(b, x, groups, size) for x in (key, value))
    gathered_key, gathered_value = (_gathered(b, past, table) for past in (past_key, past_value))
    new_keys, new_values = (
        b.op("Transpose", [x], (batch, groups, sequence, size), perm=[0, 2, 1, 3]) for x in (new_key, new_value)
    )
    masks = _Masks(b, query, table, past_lengths, int(dims(past_key)[2]), repeats, int(a["window"]))
    past_scores = _scores(b, rows, gathered_key, masks.past, a["softcap"])
    new_scores = _scores(b, rows, new_keys, masks.new, a["softcap"])
    past_weights, new_weights = _softmax(b, past_scores, new_scores, dtype_of(query))
    shape = dims(rows)
    y = b.op(
        "Add", [b.op("MatMul", [past_weights, gathered_value], shape), b.op("MatMul", [new_weights, new_values], shape)]
    )
    y = b.op("Reshape", [y, b.constant([0, groups, -1, repeats, size])], (batch, groups, sequence, repeats, size))
    y = b.op("Transpose", [y], (batch, sequence, groups, repeats, size), perm=[0, 2, 1, 3, 4])
    replace(node, [b.op("Reshape", [y, b.constant([0, 0, int(width)])], dims(query)), new_key, new_value])


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _heads(b: GraphBuilder, x: ir.Value, heads: int, size: int) -> ir.Value:
    """[B, S, heads*D] as [B, S, heads, D]."""
    batch, sequence, _ = dims(x)
    return b.op("Reshape", [x, b.constant([0, 0, heads, size])], (batch, sequence, heads, size))


def _query_rows(b: GraphBuilder, query: ir.Value, groups: int, repeats: int, size: int, scale: float) -> ir.Value:
    """The scaled query [B, S, Q*D] as [B, G, S*R, D]: the R heads of a token that share keys lie side by side."""
    batch, sequence, _ = dims(query)
    scaled = b.op("Mul", [query, b.constant(scale, DTYPES[dtype_of(query)])])
    split = b.op(
        "Reshape", [scaled, b.constant([0, 0, groups, repeats, size])], (batch, sequence, groups, repeats, size)
    )
    turned = b.op("Transpose", [split], (batch, groups, sequence, repeats, size), perm=[0, 2, 1, 3, 4])
    return b.op("Reshape", [turned, b.constant([0, groups, -1, size])], (batch, groups, f"rows_of_{repeats}", size))


def _gathered(b: GraphBuilder, past: ir.Value, table: ir.Value) -> ir.Value:
    """The cache rows [B, G, T, D] that the block table names, head by head, so that nothing is turned afterwards."""
    blocks, heads, tokens, size = (int(extent) for extent in dims(past))
    batch, columns = dims(table)
    flat = b.op("Reshape", [past, b.constant([blocks * heads, tokens, size])], (blocks * heads, tokens, size))
    wide = b.op("Cast", [table], None, I64, to=ir.DataType.INT64)
    first = b.op("Mul", [b.op("Unsqueeze", [wide, b.constant([1])], (batch, 1, columns)), b.constant(heads)])
    lines = b.constant(np.arange(heads).reshape(1, heads, 1))
    places = b.op("Add", [first, lines], (batch, heads, columns))
    rows = b.op("Gather", [flat, places], (batch, heads, columns, tokens, size), axis=0)
    return b.op("Reshape", [rows, b.constant([0, heads, -1, size])], (batch, heads, "cached", size))


class _Masks:
    """bool: which cached rows [B, 1, 1 or S*R, T] and which new tokens [1, 1, S*R, S] a row of queries sees."""

    def __init__(
        self, b: GraphBuilder, query: ir.Value, table: ir.Value, past_lengths: ir.Value, tokens: int, repeats: int,
        window: int,
    ) -> None:  # fmt: skip
        batch, sequence, _ = dims(query)
        rows = f"rows_of_{repeats}"
        steps = _counting(b, query, 1, sequence)
        slots = _counting(b, table, 1, "cached", tokens)
        past = b.op("Unsqueeze", [past_lengths, b.constant([1, 2, 3])], (batch, 1, 1, 1), I64)
        column = b.op("Unsqueeze", [steps, b.constant([1])], (sequence, 1), I64)
        spread = b.op("Add", [column, b.constant(np.zeros((1, repeats), np.int64))], (sequence, repeats), I64)
        row_steps = b.op("Reshape", [spread, b.constant([1, 1, -1, 1])], (1, 1, rows, 1), I64)
        self.past = b.op("Less", [slots, past], (batch, 1, 1, "cached"), DType.BOOL)
        self.new = b.op("LessOrEqual", [steps, row_steps], (1, 1, rows, sequence), DType.BOOL)
        if window > 0:
            oldest = b.op("Sub", [row_steps, b.constant(window)])
            first = b.op("Add", [oldest, past], (batch, 1, rows, 1))
            recent = b.op("Greater", [slots, first], (batch, 1, rows, "cached"), DType.BOOL)
            self.past = b.op("And", [self.past, recent], dims(recent))
            recent = b.op("Greater", [steps, oldest], dims(self.new), DType.BOOL)
            self.new = b.op("And", [self.new, recent])


def _counting(b: GraphBuilder, x: ir.Value, axis: int, name: Any, factor: int = 1) -> ir.Value:
    """int64 0, 1, ... up to `factor` times the extent of an axis of x."""
    extent = b.op("Shape", [x], (1,), I64, start=axis, end=axis + 1)
    if factor != 1:
        extent = b.op("Mul", [extent, b.constant([factor])])
    extent = b.op("Squeeze", [extent, b.constant([0])], (), I64)
    return b.op("Range", [b.constant(0), extent, b.constant(1)], (name,), I64)


def _scores(b: GraphBuilder, rows: ir.Value, keys: ir.Value, mask: ir.Value, softcap: float) -> ir.Value:
    """float32 [B, G, S*R, T]: products of rows and keys [B, G, T, D], hidden where the mask does not hold."""
    batch, groups, count, size = dims(keys)
    turned = b.op("Transpose", [keys], (batch, groups, size, count), perm=[0, 1, 3, 2])
    scores = b.op("MatMul", [rows, turned], (*dims(rows)[:3], count))
    if dtype_of(scores) != ir.DataType.FLOAT:
        scores = b.op("Cast", [scores], None, F32, to=ir.DataType.FLOAT)
    if softcap > 0.0:
        cap = b.constant(softcap, F32)
        scores = b.op("Mul", [b.op("Tanh", [b.op("Div", [scores, cap])]), cap])
    return b.op("Where", [mask, scores, b.constant(HIDDEN_SCORE, F32)], dims(scores), F32)


def _softmax(b: GraphBuilder, first: ir.Value, second: ir.Value, dtype: ir.DataType) -> list[ir.Value]:
    """The two parts of the softmax over both: scores are small beside keys and values, and are not joined."""
    shape = (*dims(first)[:3], 1)
    highest = [b.op("ReduceMax", [scores, b.constant([-1])], shape, keepdims=1) for scores in (first, second)]
    top = b.op("Max", highest)
    powers = [b.op("Exp", [b.op("Sub", [scores, top])]) for scores in (first, second)]
    total = b.op("Add", [b.op("ReduceSum", [power, b.constant([-1])], shape, keepdims=1) for power in powers])
    weights = [b.op("Div", [power, total]) for power in powers]
    if dtype == ir.DataType.FLOAT:
        return weights
    return [b.op("Cast", [weight], None, dtype, to=dtype) for weight in weights]


def _choose_logits(network: Network, head: ir.Node, given: dict[str, ir.Value], build: BuildConfig) -> None:
    states = _input(head, 0)
    producer = states.producer()
    if producer is None or not is_dialect(producer, "SelectTokens"):
        return
    b = builder_before(network, head)
    last = _last_tokens(b, _input(producer, 0), given["input_ids"], given["lengths"])
    head.replace_input_with(0, last)
    if not states.uses():
        network.graph.remove(producer, safe=True)
    logits = head.outputs[0]
    vocabulary = int(dims(logits)[-1])
    logits.shape = ir.Shape(["batch", vocabulary])
    _add_candidates(network, logits, min(build.logits_candidates, vocabulary))


def _last_tokens(b: GraphBuilder, x: ir.Value, ids: ir.Value, lengths: ir.Value) -> ir.Value:
    """x[b, lengths[b] - 1] of x [B, S, H], as [B, H]; the first token of a row that has none."""
    batch, _, width = dims(x)
    flat = b.op("Reshape", [x, b.constant([-1, int(width)])], ("tokens", width))
    length = b.op("Shape", [ids], (1,), I64, start=1, end=2)
    starts = b.op("Mul", [_counting(b, ids, 0, batch), length], (batch,))
    last = b.op("Max", [b.op("Sub", [lengths, b.constant(1)]), b.constant(0)], (batch,))
    return b.op("Gather", [flat, b.op("Add", [starts, last], (batch,))], (batch, width), axis=0, name="last")


def _add_candidates(network: Network, logits: ir.Value, count: int) -> None:
    """The best `count` logits of each row, sorted, their tokens, and log(sum(exp(logits))), as graph outputs."""
    b = GraphBuilder(network.graph)
    b.scope = "candidates/"
    batch = dims(logits)[0]
    values, indices = b.multi(
        "TopK",
        [logits, b.constant([count])],
        [((batch, count), F32), ((batch, count), I64)],
        axis=-1,
        largest=1,
        sorted=1,
    )
    narrow = b.op("Cast", [indices], None, I32, to=ir.DataType.INT32)
    top = b.op("ReduceMax", [logits, b.constant([-1])], (batch, 1), keepdims=1)
    powers = b.op("Exp", [b.op("Sub", [logits, top])])
    total = b.op("Log", [b.op("ReduceSum", [powers, b.constant([-1])], (batch, 1), keepdims=1)])
    lse = b.op("Squeeze", [b.op("Add", [top, total]), b.constant([1])], (batch,))
    outputs = network.graph.outputs
    kept = list(outputs)
    outputs.clear()
    for value, name in ((values, "candidate_values"), (narrow, "candidate_indices"), (lse, "log_sum_exp")):
        value.name = name
    place = next(index for index, value in enumerate(kept) if value is logits) + 1
    outputs.extend([*kept[:place], values, narrow, lse, *kept[place:]])
