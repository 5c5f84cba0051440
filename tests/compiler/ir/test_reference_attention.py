"""The bodies of attention over a cache, of attention both ways and of the mixture of experts, against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Run = Callable[..., list[np.ndarray]]
CAPACITY, SIZE = 12, 4
ATOL = 2e-6


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, softcap: float) -> np.ndarray:
    """One query [D] over keys and values [n, D] in float64."""
    scores = keys.astype(np.float64) @ query * scale
    scores = np.tanh(scores / softcap) * softcap if softcap else scores
    return softmax(scores) @ values


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("tokens", "past"), [(5, [0, 0]), (1, [4, 9]), (3, [6, 2])])
def test_attention_writes_the_cache_and_sees_its_window_of_it(
    run_operator: Run, heads: int, kv_heads: int, tokens: int, past: list[int], window: int, softcap: float
) -> None:
    rows, scale = len(past), 0.6
    query = normal(rows, tokens, heads * SIZE)
    key, value = normal(rows, tokens, kv_heads * SIZE, seed=1), normal(rows, tokens, kv_heads * SIZE, seed=2)
    caches = [normal(rows, kv_heads, CAPACITY, SIZE, seed=seed) for seed in (3, 4)]
    y, *presents = run_operator(
        "Attention",
        [query, key, value, *caches, np.array(past), np.full(rows, tokens)],
        static=(3, 4),
        layer=0, num_heads=heads, num_kv_heads=kv_heads, head_size=SIZE, scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    for cache, new, present in zip(caches, (key, value), presents, strict=True):
        for row, start in enumerate(past):
            cache[row, :, start : start + tokens] = new[row].reshape(tokens, kv_heads, SIZE).transpose(1, 0, 2)
        np.testing.assert_array_equal(present, cache)
    for row, token, head in np.ndindex(rows, tokens, heads):
        last = past[row] + token
        seen = slice(max(0, last - window + 1) if window else 0, last + 1)
        group = head // (heads // kv_heads)
        wanted = attend(
            query[row, token, head * SIZE : (head + 1) * SIZE],
            caches[0][row, group, seen],
            caches[1][row, group, seen],
            scale,
            softcap,
        )
        np.testing.assert_allclose(y[row, token, head * SIZE : (head + 1) * SIZE], wanted, atol=ATOL)


def test_encoder_attention_sees_every_valid_token_and_no_padding(run_operator: Run) -> None:
    heads, lengths = 2, np.array([5, 1, 3])
    query, key, value = (normal(3, 5, heads * SIZE, seed=seed) for seed in range(3))
    (y,) = run_operator("EncoderAttention", [query, key, value, lengths], num_heads=heads, head_size=SIZE, scale=0.4)
    for row, head in np.ndindex(3, heads):
        part = slice(head * SIZE, (head + 1) * SIZE)
        keys, values = key[row, : lengths[row], part], value[row, : lengths[row], part]
        for token in range(lengths[row]):
            wanted = attend(query[row, token, part], keys, values, 0.4, 0.0)
            np.testing.assert_allclose(y[row, token, part], wanted, atol=ATOL)


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_mixture_of_experts(run_operator: Run, top_k: int, normalize: int, kind: str) -> None:
    experts, width, hidden = 4, 6, 8
    x, logits = normal(2, 3, hidden), normal(2, 3, experts, seed=1)
    gate_up, down = normal(experts, 2 * width, hidden, seed=2), normal(experts, hidden, width, seed=3)
    (y,) = run_operator("MoE", [x, logits, gate_up, down], static=(2, 3), top_k=top_k, normalize=normalize, kind=kind)
    wanted = np.zeros(x.shape)
    for place in np.ndindex(2, 3):
        scores = softmax(logits[place].astype(np.float64))
        chosen = np.argsort(-scores)[:top_k]
        share = scores[chosen] / (scores[chosen].sum() if normalize else 1.0)
        for weight, expert in zip(share, chosen, strict=True):
            gate, up = np.split(gate_up[expert].astype(np.float64) @ x[place], 2)
            wanted[place] += weight * (down[expert] @ (gated(kind, gate) * up))
    np.testing.assert_allclose(y, wanted, atol=20 * ATOL, rtol=1e-5)


def gated(kind: str, x: Any) -> Any:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
