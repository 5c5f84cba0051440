"""Each dialect operator's body, run by onnxruntime, computes what plain numpy does from the operator's description.

Attention over the cache and the mixture of experts have a file of their own beside this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

B, S, H = 3, 5, 8
LENGTHS = np.array([5, 1, 3])
ATOL = {np.float32: 2e-6, np.float16: 4e-3}
"""Sums of 8 to 48 normal terms: a few eps of results below 8."""

Run = Callable[..., list[np.ndarray]]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: Any, epsilon: float) -> np.ndarray:
    x = x.astype(np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + epsilon) * weight + bias


def activation(kind: str, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return {
        "silu": lambda: x / (1 + np.exp(-x)),
        "gelu": lambda: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda: np.maximum(x, 0),
        "tanh": lambda: np.tanh(x),
    }[kind]()


@pytest.mark.parametrize("scale", [1.0, 8.5])
def test_embedding(run_operator: Run, scale: float) -> None:
    ids, weight = np.array([[0, 6, 2], [1, 1, 5]]), normal(7, H)
    (y,) = run_operator("Embedding", [ids, weight], scale=scale)
    np.testing.assert_allclose(y, weight[ids] * scale, rtol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_linear(run_operator: Run, bias: bool) -> None:
    operands = [normal(B, S, H), normal(6, H), *([normal(6)] if bias else [])]
    (y,) = run_operator("Linear", operands)
    np.testing.assert_allclose(y, operands[0] @ operands[1].T + (operands[2] if bias else 0), atol=ATOL[np.float32])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_rms_norm(run_operator: Run, dtype: Any, epsilon: float) -> None:
    x, weight = normal(B, S, H).astype(dtype), normal(H).astype(dtype)
    (y,) = run_operator("RMSNorm", [x, weight], epsilon=epsilon)
    assert y.dtype == dtype
    np.testing.assert_allclose(y, rms_norm(x, weight, epsilon), atol=ATOL[dtype])


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm(run_operator: Run, bias: bool) -> None:
    x, weight, offset = normal(B, S, H), normal(H), normal(H, seed=1)
    (y,) = run_operator("LayerNorm", [x, weight, *([offset] if bias else [])], epsilon=0.1)
    np.testing.assert_allclose(y, layer_norm(x, weight, offset if bias else 0, 0.1), atol=ATOL[np.float32])


def test_add_rms_norm(run_operator: Run) -> None:
    x, residual, weight = normal(B, S, H), normal(B, S, H, seed=1), normal(H)
    y, total = run_operator("AddRMSNorm", [x, residual, weight], epsilon=0.1)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_allclose(y, rms_norm(x + residual, weight, 0.1), atol=ATOL[np.float32])


@pytest.mark.parametrize("bias", [False, True])
def test_add_layer_norm(run_operator: Run, bias: bool) -> None:
    x, residual, weight, offset = normal(B, S, H), normal(B, S, H, seed=1), normal(H), normal(H, seed=1)
    y, total = run_operator("AddLayerNorm", [x, residual, weight, *([offset] if bias else [])], epsilon=0.1)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_allclose(y, layer_norm(x + residual, weight, offset if bias else 0, 0.1), atol=ATOL[np.float32])


def test_positions(run_operator: Run) -> None:
    past = np.array([0, 7, 2])
    (positions,) = run_operator("Positions", [np.zeros((B, S), np.int64), past])
    np.testing.assert_array_equal(positions, past[:, None] + np.arange(S))


@pytest.mark.parametrize("rotary_size", [8, 4])
def test_rotary(run_operator: Run, rotary_size: int) -> None:
    heads, size = 3, 8
    x, angles = normal(B, S, heads * size), normal(B, S, rotary_size // 2) * 3
    cos, sin = np.cos(angles), np.sin(angles)
    (y,) = run_operator("Rotary", [x, cos, sin], num_heads=heads, rotary_size=rotary_size)
    wanted = x.reshape(B, S, heads, size).copy()
    first, second = np.split(wanted[..., :rotary_size].copy(), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    wanted[..., :rotary_size] = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    np.testing.assert_allclose(y, wanted.reshape(x.shape), atol=ATOL[np.float32])


def test_head_rms_norm(run_operator: Run) -> None:
    x, weight = normal(B, S, 4 * H), normal(H)
    (y,) = run_operator("HeadRMSNorm", [x, weight], num_heads=4, epsilon=0.1)
    wanted = rms_norm(x.reshape(B, S, 4, H), weight, 0.1)
    np.testing.assert_allclose(y, wanted.reshape(x.shape), atol=ATOL[np.float32])


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "tanh"])
def test_activations(run_operator: Run, kind: str) -> None:
    x, up = normal(B, S, H) * 3, normal(B, S, H, seed=1)
    (y,) = run_operator("Activation", [x], kind=kind)
    np.testing.assert_allclose(y, activation(kind, x), atol=ATOL[np.float32])
    (apart,) = run_operator("GatedActivation", [x, up], kind=kind)
    np.testing.assert_allclose(apart, activation(kind, x) * up, atol=ATOL[np.float32])
    (packed,) = run_operator("GatedActivation", [np.concatenate([x, up], axis=-1)], kind=kind)
    np.testing.assert_array_equal(packed, apart)


def test_split(run_operator: Run) -> None:
    x = normal(B, S, H)
    parts = run_operator("Split", [x], sizes=[4, 1, 3])
    for part, wanted in zip(parts, np.split(x, [4, 5], axis=-1), strict=True):
        np.testing.assert_array_equal(part, wanted)


def test_select_tokens(run_operator: Run) -> None:
    x = normal(B, S, H)
    (y,) = run_operator("SelectTokens", [x, LENGTHS])
    np.testing.assert_array_equal(y[:, 0], x[np.arange(B), LENGTHS - 1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, 0.0, False), (0.5, 2.0, True)])
def test_logits_head(run_operator: Run, dtype: Any, scale: float, softcap: float, bias: bool) -> None:
    operands = [normal(B, S, H).astype(dtype), normal(6, H).astype(dtype), *([normal(6).astype(dtype)] if bias else [])]
    (logits,) = run_operator("LogitsHead", operands, scale=scale, softcap=softcap)
    x, weight = (operand.astype(np.float64) for operand in operands[:2])
    wanted = (x @ weight.T + (operands[2] if bias else 0)) * scale
    wanted = np.tanh(wanted / softcap) * softcap if softcap else wanted
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, wanted, atol=ATOL[dtype])


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_pool(run_operator: Run, kind: str, normalize: int, dtype: Any) -> None:
    x = normal(B, S, H).astype(dtype)
    (y,) = run_operator("Pool", [x, LENGTHS], kind=kind, normalize=normalize)
    wide = x.astype(np.float64)
    wanted = {
        "mean": lambda: np.stack([row[:length].mean(axis=0) for row, length in zip(wide, LENGTHS, strict=True)]),
        "cls": lambda: wide[:, 0],
        "last": lambda: wide[np.arange(B), LENGTHS - 1],
    }[kind]()
    wanted = wanted / np.linalg.norm(wanted, axis=-1, keepdims=True) if normalize else wanted
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, wanted, atol=ATOL[np.float32])
