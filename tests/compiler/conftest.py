"""Tiny random models of every architecture variant, from transformers; a new variant is one line of `VARIANTS`."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

VOCABULARY, HIDDEN, LAYERS, POSITIONS, ORIGINAL = 128, 64, 2, 64, 16
"""Every model is of this size; ORIGINAL is what rotary scalings stretch, shorter than the longest prompt."""


@dataclass(frozen=True)
class Variant:
    """A transformers class and its config, by name so that collecting tests imports no transformers."""

    name: str
    architecture: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def depends_on_length(self) -> bool:
        """Whether a position's rotation depends on the row's length, so that prompt and steps differ from one pass."""
        rope = self.options.get("rope_parameters", {})
        return rope.get("rope_type") in ("dynamic", "longrope")


def _llama(name: str, **options: Any) -> Variant:
    return Variant(name, "LlamaForCausalLM", "LlamaConfig", options)


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


_STRETCHED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_FACTORS = {
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 12.0],
    "original_max_position_embeddings": ORIGINAL,
}
_SLIDING = ["sliding_attention", "full_attention"]
_MINISTRAL = {"head_dim": 16, "sliding_window": 5, "layer_types": _SLIDING}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 5, "layer_types": _SLIDING}
_MIXED_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
_GPT2 = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN3_MOE = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_PHI3_LONGROPE = {
    **_rope("longrope", **_FACTORS, partial_rotary_factor=1.0),
    "original_max_position_embeddings": ORIGINAL,
}

VARIANTS = (
    _llama("llama"),
    _llama("llama-tied", tie_word_embeddings=True),
    _llama("llama-biases", attention_bias=True, mlp_bias=True),
    _llama("llama-no-grouping", num_key_value_heads=4),
    _llama("llama-one-kv-head", num_key_value_heads=1, hidden_act="gelu"),
    _llama("llama-head-size", head_dim=32),
    _llama("llama-odd-head-size", head_dim=24),
    _llama("llama-linear", **_rope("linear", factor=4.0)),
    _llama("llama-dynamic", **_rope("dynamic", factor=4.0), max_position_embeddings=ORIGINAL),
    _llama("llama-yarn", **_rope("yarn", **_STRETCHED)),
    _llama("llama-llama3", **_rope("llama3", **_STRETCHED, low_freq_factor=1.0, high_freq_factor=4.0)),
    _llama("llama-longrope", **_rope("longrope", **_FACTORS)),
    Variant("mistral", "MistralForCausalLM", "MistralConfig", {"sliding_window": None}),
    Variant("mistral-sliding", "MistralForCausalLM", "MistralConfig", {"sliding_window": 5, "head_dim": 32}),
    Variant("ministral", "MinistralForCausalLM", "MinistralConfig", _MINISTRAL),
    Variant("qwen2", "Qwen2ForCausalLM", "Qwen2Config"),
    Variant(
        "qwen2-sliding",
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    Variant("qwen3", "Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32}),
    Variant("qwen3-bias", "Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 16, "attention_bias": True}),
    Variant("gemma2", "Gemma2ForCausalLM", "Gemma2Config", {**_GEMMA, "attn_logit_softcapping": 2.0}),
    Variant(
        "gemma2-no-caps",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    Variant("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", {**_GEMMA, "rope_parameters": _MIXED_BASES}),
    Variant("phi3", "Phi3ForCausalLM", "Phi3Config"),
    Variant(
        "phi3-partial",
        "Phi3ForCausalLM",
        "Phi3Config",
        {**_rope("default", partial_rotary_factor=0.5), "sliding_window": 5, "head_dim": 32},
    ),
    Variant("phi3-longrope", "Phi3ForCausalLM", "Phi3Config", _PHI3_LONGROPE),
    Variant("mixtral", "MixtralForCausalLM", "MixtralConfig", _MIXTRAL),
    Variant("mixtral-sliding", "MixtralForCausalLM", "MixtralConfig", {**_MIXTRAL, "sliding_window": 5}),
    Variant("mixtral-gelu", "MixtralForCausalLM", "MixtralConfig", {**_MIXTRAL, "hidden_act": "gelu"}),
    Variant("qwen3-moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_QWEN3_MOE, "mlp_only_layers": [0]}),
    Variant("qwen3-moe-scaled", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_QWEN3_MOE, "norm_topk_prob": True}),
    Variant(
        "qwen3-moe-sliding",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_QWEN3_MOE, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 5},
    ),
    Variant("gpt2", "GPT2LMHeadModel", "GPT2Config", _GPT2),
    Variant(
        "gpt2-scales",
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_GPT2, "n_inner": 96, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False},
    ),
)

_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}


def make_model(variant: Variant) -> Any:
    """The variant's transformers model in float32, every parameter random (norms and biases start constant)."""
    import torch
    import transformers

    sizes = {} if variant.architecture == "GPT2LMHeadModel" else _SIZES
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    options = copy.deepcopy({"vocab_size": VOCABULARY, **sizes, **tokens, **variant.options})
    config = getattr(transformers, variant.config)(**options, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, variant.architecture)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def reference_logits(variant: Variant, model: Any, tokens: np.ndarray, prompt: int) -> np.ndarray:
    """transformers' logits [T, V] of tokens [T]: one pass, or a prompt and steps where the length changes angles."""
    import torch

    with torch.no_grad():
        if not variant.depends_on_length:
            return model(torch.tensor(tokens[None])).logits[0].numpy()
        model = copy.deepcopy(model)  # its rotary tables remember the longest length they have seen
        ends = [0, prompt, *range(prompt + 1, len(tokens) + 1)]
        cache, parts = None, []
        for start, stop in itertools.pairwise(ends):
            result = model(torch.tensor(tokens[None, start:stop]), past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            parts.append(result.logits[0].numpy())
        return np.concatenate(parts)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


@pytest.fixture(scope="module")
def model(variant: Variant) -> Any:
    return make_model(variant)


@pytest.fixture(scope="session")
def variants() -> dict[str, Variant]:
    """Every variant by name, for tests that want some of them."""
    return {variant.name: variant for variant in VARIANTS}


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[Variant], Any]:
    return make_model


@pytest.fixture(scope="session")
def transformers_logits() -> Callable[[Variant, Any, np.ndarray, int], np.ndarray]:
    """transformers' logits of a row of tokens; see `reference_logits`."""
    return reference_logits


class Rows:
    """Steps a session by rows: every slot has blocks of its own, in an order that differs from group to group."""

    def __init__(self, session: Any) -> None:
        self.session = session
        cache = session.info.cache
        columns = -(-session.info.max_seq_len // cache.tokens_per_block)
        random = np.random.default_rng(3)
        orders = [random.permutation(cache.num_blocks) for _ in cache.groups]
        slots = cache.num_blocks // columns
        self._tables = [order[: slots * columns].reshape(slots, columns).astype(np.int32) for order in orders]

    def step(self, *rows: tuple[int, np.ndarray, int]) -> list[np.ndarray]:
        """Runs (slot, new tokens, past tokens) side by side; logits of each, or of its last token alone."""
        counts = [len(tokens) for _, tokens, _ in rows]
        ends = np.cumsum(counts)
        every = self.session.info.gathers_all_logits
        logits = self.session.step(
            np.concatenate([tokens for _, tokens, _ in rows]),
            np.concatenate([np.arange(past, past + len(tokens)) for _, tokens, past in rows]),
            np.concatenate([[0], ends]),
            np.array([past for _, _, past in rows]),
            np.arange(ends[-1]) if every else ends - 1,
            [table[[slot for slot, _, _ in rows]] for table in self._tables],
        )
        return np.split(logits.copy(), ends[:-1] if every else np.arange(1, len(rows)))


@pytest.fixture(scope="session")
def rows_of() -> Callable[[Any], Rows]:
    """Steps a session by rows; see `Rows`."""
    return Rows
