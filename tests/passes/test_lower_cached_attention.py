"""The project's own attention kernel gives what the reference body gives, in every variant that the pass accepts."""

import numpy as np
import pytest

from trtllm.compiler.ir.verifier import verify
from trtllm.dtypes import DType
from trtllm.passes.cleanup import RemoveDeadCode
from trtllm.passes.lower_attention import LowerAttention
from trtllm.passes.lower_cached_attention import LowerCachedAttention

BATCH, CAPACITY, KV_HEADS = 3, 48, 2
VARIANTS = {
    "plain": {},
    "rotary": {"rotary": 32},
    "partial rotary": {"rotary": 16},
    "window": {"rotary": 32, "window": 5},
    "softcap": {"rotary": 32, "softcap": 3.0},
    "head norms": {"rotary": 32, "norms": True},
    "norms without rotary": {"norms": True, "window": 9},
    "many query heads": {"rotary": 32, "heads": 10},
    "one query head a cache head": {"rotary": 32, "heads": 2},
    "wide heads": {"rotary": 128, "head_size": 128},
    "narrow heads": {"rotary": 8, "head_size": 8},
}


def attention(small, *, heads=6, head_size=32, rotary=0, window=0, softcap=0.0, norms=False):
    b = small.b
    widths = [heads * head_size, KV_HEADS * head_size, KV_HEADS * head_size]
    x = b.input("x", DType.FLOAT32, ("batch", "sequence", sum(widths)))
    past_lengths, lengths = (b.input(name, DType.INT64, ("batch",)) for name in ("past_lengths", "lengths"))
    shape = ("batch", KV_HEADS, CAPACITY, head_size)
    caches = [b.input(name, DType.FLOAT32, shape) for name in ("past_key", "past_value")]
    query, key, value = b.dialect("Split", [b.op("Mul", [x, b.constant(1.0)])], sizes=widths)
    if norms:
        query = b.dialect("HeadRMSNorm", [query, small.weight("q_norm", head_size)], num_heads=heads, epsilon=1e-5)
        key = b.dialect("HeadRMSNorm", [key, small.weight("k_norm", head_size)], num_heads=KV_HEADS, epsilon=1e-5)
    if rotary:
        positions = positions_of(b, past_lengths)
        angles = small.random.uniform(0, 6, (CAPACITY, rotary // 2)).astype(np.float32)
        tables = [
            b.op(
                "Gather", [b.named_constant(name, table), positions], ("batch", "sequence", rotary // 2), DType.FLOAT32
            )
            for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles)))
        ]
        query = b.dialect("Rotary", [query, *tables], num_heads=heads, rotary_size=rotary)
        key = b.dialect("Rotary", [key, *tables], num_heads=KV_HEADS, rotary_size=rotary)
    results = b.dialect(
        "Attention", [query, key, value, *caches, past_lengths, lengths], layer=0, num_heads=heads,
        num_kv_heads=KV_HEADS, head_size=head_size, scale=0.2, window=window, softcap=softcap,
    )  # fmt: skip
    for result, name in zip(results, ("y", "present_key", "present_value"), strict=True):
        b.output(result, name)
    return small.finish()


def positions_of(b, past_lengths):
    ids = b.input("ids", DType.INT64, ("batch", "sequence"))
    return b.dialect("Positions", [ids, past_lengths])


def feeds(small, network, sequence, past, lengths):
    shapes = {
        value.name: [extent if isinstance(extent, int) else None for extent in value.shape]
        for value in network.graph.inputs
    }
    random = small.random
    feed = {
        "x": random.normal(size=(BATCH, sequence, shapes["x"][2])).astype(np.float32),
        "past_lengths": np.array(past),
        "lengths": np.array(lengths),
    }
    for name in ("past_key", "past_value"):
        feed[name] = random.normal(size=(BATCH, *shapes[name][1:])).astype(np.float32)
    if "ids" in shapes:
        feed["ids"] = np.zeros((BATCH, sequence), np.int64)
    return feed


STEPS = {
    "first prompt": (7, [0, 0, 0], [7, 7, 7]),
    "ragged prompt": (7, [0, 0, 0], [7, 1, 4]),
    "decode": (1, [3, 40, 0], [1, 1, 1]),
    "later chunk, ragged": (5, [11, 2, 30], [5, 3, 1]),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernel_agrees_with_the_reference_body(small, context_for, evaluate, operators, variant, step) -> None:
    network = attention(small, **VARIANTS[variant])
    sequence, past, lengths = STEPS[step]
    feed = feeds(small, network, sequence, past, lengths)
    expected = evaluate(small, network, feed)
    assert LowerCachedAttention().run(network, context_for("trtllm.cpu::CachedAttention")) == 1
    RemoveDeadCode().run(network, context_for())
    verify(network.graph, after="lower-cached-attention")
    assert operators(network) == ["Mul", "CachedAttention"]
    y, key, value = evaluate(small, network, feed)
    for row in range(BATCH):
        valid, rows = slice(0, lengths[row]), slice(0, past[row] + lengths[row])
        # float32 sums over head_size and over the keys, of values near one
        np.testing.assert_allclose(y[row, valid], expected[0][row, valid], atol=1e-5)
        np.testing.assert_allclose(key[row, :, rows], expected[1][row, :, rows], atol=1e-5)
        np.testing.assert_array_equal(value[row, :, rows], expected[2][row, :, rows])


def test_without_the_kernel_the_pass_leaves_attention_alone(small, context_for) -> None:
    network = attention(small)
    assert LowerCachedAttention().run(network, context_for()) == 0


def test_projections_that_are_not_packed_go_to_the_other_kernel(small, context_for, operators) -> None:
    network = attention(small)
    split = next(node for node in network.graph if node.op_type == "Split")
    small.b.output(small.b.op("Neg", [split.outputs[0]]), "another_reader")
    context = context_for("trtllm.cpu::CachedAttention", "com.microsoft::GroupQueryAttention")
    assert LowerCachedAttention().run(network, context) == 0
    assert "not one Split" in context.near_misses[0].reason
    assert LowerAttention().run(network, context) == 1
