"""Tiny models of every architecture, made by transformers from a seed."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from . import fake_tensorrt

VOCABULARY = 128
POSITIONS = 64
# What any config may be called; a config takes the keys that it has.
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "dim": 64,
    "intermediate_size": 96,
    "hidden_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "max_position_embeddings": POSITIONS,
    "sliding_window": 6,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Makes a model of a transformers class: two layers, hidden 64, vocabulary 128, 64 positions."""
    torch = pytest.importorskip("torch", reason="tiny models are made with torch")
    transformers = pytest.importorskip("transformers", reason="tiny models are made with transformers")

    def make(architecture: str, **settings: object) -> Any:
        if not hasattr(transformers, architecture):
            pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
        model_class = getattr(transformers, architecture)
        defaults = model_class.config_class()
        known = {key: value for key, value in TINY.items() if hasattr(defaults, key)}
        torch.manual_seed(3)
        config = model_class.config_class(**{**known, **settings})
        return model_class(config).eval()

    return make


@pytest.fixture
def tensorrt_86(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in as the installed library, and no GPU."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt)
    monkeypatch.setattr("trtllm.compiler.targets.tensorrt.emit.timing_cache_path", lambda _: None)
    monkeypatch.setattr(fake_tensorrt, "_state", {})
    return fake_tensorrt
