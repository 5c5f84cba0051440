"""Packed tokens over a cache of blocks give what padded rows give, whatever the rows' lengths and the blocks' order."""

import numpy as np
import onnx_ir as ir
import pytest

from trtllm.compiler.ir.network import CacheGroup, CacheLayer, ModelInfo, Network
from trtllm.compiler.ir.text import from_text, to_text
from trtllm.compiler.ir.verifier import verify
from trtllm.dtypes import DType
from trtllm.passes.cleanup import RemoveDeadCode
from trtllm.passes.pack_tokens import PackTokens
from trtllm.passes.select_tokens import SelectLastToken

PAGED = "trtllm.cpu::PagedAttention"
HEADS, KV_HEADS, SIZE, VOCABULARY, CAPACITY = 4, 2, 8, 24, 20
WIDTHS = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
PAST, COUNTS = (3, 0, 11), (1, 7, 4)
BLOCK, COLUMNS, BLOCKS = 4, 5, 17


def decoder(small, windows=(0, 6, 0), *, learned=True, reads_lengths=False):
    """Layers of packed projections; positions are learned, or there are none."""
    b = small.b
    ids = b.input("input_ids", DType.INT64, ("batch", "sequence"))
    past_lengths, lengths = (b.input(name, DType.INT64, ("batch",)) for name in ("past_lengths", "lengths"))
    x = b.dialect("Embedding", [ids, small.weight("words", VOCABULARY, 16)])
    if learned:
        positions = b.dialect("Positions", [ids, past_lengths])
        x = b.op("Add", [x, b.dialect("Embedding", [positions, small.weight("places", CAPACITY, 16)])])
    if reads_lengths:
        total = b.op("Cast", [b.op("Add", [past_lengths, lengths])], None, DType.FLOAT32, to=ir.DataType.FLOAT)
        total = b.op("Unsqueeze", [total, b.constant([1, 2])], ("batch", 1, 1), DType.FLOAT32, name="total")
        x = b.op("Mul", [x, total])
    presents = []
    for index, window in enumerate(windows):
        shape = ("batch", KV_HEADS, CAPACITY, SIZE)
        caches = [b.input(f"past_{kind}.{index}", DType.FLOAT32, shape) for kind in ("key", "value")]
        normed = b.dialect("RMSNorm", [x, small.weight(f"norm.{index}", 16)])
        packed = b.dialect("Linear", [normed, small.weight(f"qkv.{index}", sum(WIDTHS), 16)])
        parts = b.dialect("Split", [packed], sizes=WIDTHS)
        y, key, value = b.dialect(
            "Attention", [*parts, *caches, past_lengths, lengths], layer=index, num_heads=HEADS,
            num_kv_heads=KV_HEADS, head_size=SIZE, scale=0.3, window=window,
        )  # fmt: skip
        x = b.op("Add", [x, b.dialect("Linear", [y, small.weight(f"out.{index}", 16, WIDTHS[0])])])
        presents += [(f"present_key.{index}", key), (f"present_value.{index}", value)]
    b.output(b.dialect("LogitsHead", [x, small.weight("head", VOCABULARY, 16)]), "logits")
    for name, value in presents:
        b.output(value, name)
    cache = tuple(CacheLayer(KV_HEADS, SIZE, window) for window in windows)
    network = Network(
        ir.Model(small.graph, ir_version=11), ModelInfo("decoder", "Small", 8, 16, len(windows), 20, cache)
    )
    verify(network.graph, after="the test")
    return network


def padded_feed(small, layers):
    random = small.random
    feed = {
        "input_ids": random.integers(0, VOCABULARY, (len(PAST), max(COUNTS))),
        "past_lengths": np.array(PAST),
        "lengths": np.array(COUNTS),
    }
    for name in (f"past_{kind}.{layer}" for layer in range(layers) for kind in ("key", "value")):
        feed[name] = random.normal(size=(len(PAST), KV_HEADS, CAPACITY, SIZE)).astype(np.float32)
    return feed


def packed_feed(network, padded, chosen):
    """The same step: tokens side by side, each group's blocks in an order of its own."""
    random = np.random.default_rng(9)
    ids, starts = padded["input_ids"], np.concatenate([[0], np.cumsum(COUNTS)])
    feed = {
        "input_ids": np.concatenate([row[:count] for row, count in zip(ids, COUNTS, strict=True)])[None],
        "positions": np.concatenate([np.arange(p, p + c) for p, c in zip(PAST, COUNTS, strict=True)])[None],
        "row_starts": starts,
        "past_lengths": np.array(PAST),
        "logits_indices": np.array(chosen),
    }
    for index, group in enumerate(network.cache_groups):
        table = random.permutation(BLOCKS)[: len(PAST) * COLUMNS].reshape(len(PAST), COLUMNS).astype(np.int32)
        feed[f"block_table.{index}"] = table
        for name in (f"past_{kind}.{layer}" for layer in group.layers for kind in ("key", "value")):
            feed[name] = paged(padded[name], table)
    return feed


def tolerance(values):
    """Float32 rounding: eps * sqrt(terms) for each of the 5 products of 3 layers and the head, of the largest value."""
    return np.finfo(np.float32).eps * np.sqrt(WIDTHS[0]) * (5 * 3 + 1) * np.nanmax(np.abs(values))


def paged(cache, table):
    blocks = np.full((BLOCKS, KV_HEADS, BLOCK, SIZE), np.nan, np.float32)
    for row, columns in enumerate(table):
        for column, block in enumerate(columns):
            blocks[block] = cache[row, :, column * BLOCK : (column + 1) * BLOCK]
    return blocks


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_a_packed_step_is_the_padded_one(small, context_for, evaluate, operators, learned, gathers) -> None:
    network = decoder(small, learned=learned)
    feed = padded_feed(small, 3)
    every, *presents = evaluate(small, network, feed)
    context = context_for(PAGED, gather_context_logits=gathers)
    SelectLastToken().run(network, context)
    assert PackTokens().run(network, context) == 3
    RemoveDeadCode().run(network, context)
    verify(network.graph, after="pack-tokens")
    assert network.cache_groups == (CacheGroup(0, (0, 2)), CacheGroup(6, (1,)))
    assert not {"Positions", "SelectTokens", "Attention"} & set(operators(network))
    chosen = [0, 3, 7, 8, 11]
    packed = packed_feed(network, feed, chosen)
    logits, *blocks = evaluate(small, network, packed)
    flat = np.concatenate([row[:count] for row, count in zip(every, COUNTS, strict=True)])
    np.testing.assert_allclose(logits[0], flat[chosen], rtol=0, atol=tolerance(flat))
    names = [value.name for value in network.graph.outputs][1:]
    tables = {
        layer: packed[f"block_table.{i}"] for i, group in enumerate(network.cache_groups) for layer in group.layers
    }
    for name, pool, present in zip(names, blocks, presents, strict=True):
        expected = paged(present, tables[int(name.split(".")[1])])
        for row, columns in enumerate(tables[int(name.split(".")[1])]):
            for position in range(PAST[row] + COUNTS[row]):
                place = columns[position // BLOCK], slice(None), position % BLOCK
                np.testing.assert_allclose(pool[place], expected[place], rtol=0, atol=tolerance(present))


def test_the_inputs_of_a_packed_graph_are_those_of_a_session(small, context_for) -> None:
    network = decoder(small)
    PackTokens().run(network, context_for(PAGED))
    assert [value.name for value in network.graph.inputs][:7] == [
        "input_ids", "positions", "row_starts", "past_lengths", "logits_indices", "block_table.0", "block_table.1",
    ]  # fmt: skip
    assert to_text(from_text(to_text(network.model))) == to_text(network.model)


def test_one_attention_that_the_kernel_cannot_take_leaves_all_padded(small, context_for, operators) -> None:
    network = decoder(small)
    split = [node for node in network.graph if node.op_type == "Split"][1]
    small.b.output(small.b.op("Neg", [split.outputs[0]]), "another_reader")
    before = operators(network)
    context = context_for(PAGED)
    assert PackTokens().run(network, context) == 0
    assert operators(network) == before and network.cache_groups == ()
    assert "not one Split" in context.near_misses[0].reason


def test_a_graph_that_depends_on_the_lengths_otherwise_stays_padded(small, context_for) -> None:
    network = decoder(small, reads_lengths=True)
    context = context_for(PAGED)
    assert PackTokens().run(network, context) == 0
    assert "lengths" in context.near_misses[0].reason


def test_without_the_kernel_nothing_is_packed(small, context_for) -> None:
    assert PackTokens().run(decoder(small), context_for("trtllm.cpu::CachedAttention")) == 0
