"""One model under every form of its config.json is one graph; what changes the computation is built or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.compiler.pipeline import compile_network, read_model, resolve
from trtllm.config import build_config
from trtllm.errors import BadInputError, TrtllmError, UnsupportedModelError, UsageError
from trtllm.progress import Silent

ABSENT = object()
GEMMA3_OLD = {
    "rope_parameters": ABSENT,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e3,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
QWEN2_OLD = {
    "layer_types": ABSENT,
    "rope_parameters": ABSENT,
    "rope_theta": 1e4,
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 1,
}
PHI3_OLD = {
    "rope_parameters": ABSENT,
    "rope_theta": 1e4,
    "rope_scaling": {
        "type": "su",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0, 12.0],
    },
}


@pytest.fixture
def checkpoint(variants: dict[str, Any], tiny_model: Callable[[Any], Any]) -> Callable[..., Checkpoint]:
    """The checkpoint of a variant with some config keys changed, or ABSENT."""

    def make(name: str, **changes: Any) -> Checkpoint:
        read = read_model(tiny_model(variants[name]), progress=Silent())
        config = {key: value for key, value in {**read.config, **changes}.items() if value is not ABSENT}
        return replace(read, config=config)

    return make


def graph_hash(checkpoint: Checkpoint) -> str:
    return compile_network(checkpoint, build_config({"max_seq_len": 16})).network_hash


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-linear", {"rope_parameters": ABSENT, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("llama", {"rope_parameters": ABSENT}),
        ("llama", {"rope_parameters": ABSENT, "rope_theta": 10000, "rope_scaling": None, "head_dim": None}),
        ("llama", {"pretraining_tp": 2, "attention_dropout": 0.1, "use_cache": False, "layer_types": None}),
        ("mistral-sliding", {"layer_types": ["sliding_attention"] * 2}),
        ("qwen2-sliding", QWEN2_OLD),
        ("qwen2-sliding", {**QWEN2_OLD, "rope_theta": ABSENT}),
        ("qwen2", {"layer_types": ABSENT, "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}),
        ("gemma2", {"layer_types": ABSENT, "hidden_act": "relu", "tie_word_embeddings": ABSENT}),
        ("gemma3", {**GEMMA3_OLD, "layer_types": ABSENT, "sliding_window_pattern": 2}),
        ("gemma3", {"layer_types": ABSENT, "_sliding_window_pattern": 2}),
        ("phi3-longrope", PHI3_OLD),
        ("phi3-longrope", {**PHI3_OLD, "rope_scaling": {**PHI3_OLD["rope_scaling"], "type": "yarn"}}),
        ("gpt2", {"tie_word_embeddings": ABSENT, "n_inner": 256, "reorder_and_upcast_attn": True}),
    ],
)
def test_forms_of_a_config_that_mean_the_same_give_one_graph(
    checkpoint: Callable[..., Checkpoint], name: str, changes: dict[str, Any]
) -> None:
    assert graph_hash(checkpoint(name, **changes)) == graph_hash(checkpoint(name))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"rope_theta": 5e5, "rope_parameters": ABSENT}),
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama", {"hidden_act": "gelu"}),
        ("mistral-sliding", {"sliding_window": 6}),
        ("mistral-sliding", {"sliding_window": ABSENT}),
        ("mistral-sliding", {"layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen2-sliding", {**QWEN2_OLD, "max_window_layers": 0}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma2", {"attn_logit_softcapping": ABSENT}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma3", {"sliding_window": 4}),
        ("gemma3", {**GEMMA3_OLD, "rope_scaling": None}),
        ("gemma3", {**GEMMA3_OLD, "rope_local_base_freq": ABSENT}),
        ("gemma3", {"layer_types": ABSENT}),
        ("phi3-longrope", {"original_max_position_embeddings": ABSENT}),
        ("phi3", {"rms_norm_eps": 1e-4}),
        ("gpt2", {"scale_attn_weights": False}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"layer_norm_epsilon": 1e-3}),
        ("gpt2", {"activation_function": "gelu"}),
    ],
)
def test_a_key_that_changes_the_computation_changes_the_graph(
    checkpoint: Callable[..., Checkpoint], name: str, changes: dict[str, Any]
) -> None:
    assert graph_hash(checkpoint(name, **changes)) != graph_hash(checkpoint(name))


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("llama", {"sliding_window": 8}, UnsupportedModelError, "sliding_window = 8"),
        ("llama", {"hidden_act": "xielu"}, UnsupportedModelError, "activation 'xielu'"),
        ("llama", {"num_key_value_heads": 3}, BadInputError, "4 attention heads for 3 key-value heads"),
        ("llama", {"hidden_size": "64"}, BadInputError, "hidden_size = '64', expected a positive integer"),
        ("llama", {"vocab_size": ABSENT}, BadInputError, "lacks 'vocab_size'"),
        ("llama", {"intermediate_size": 80}, BadInputError, "mlp.gate_proj.weight is 96x64, config.json implies 80x64"),
        ("llama", {"attention_bias": True}, BadInputError, "missing: model.layers.0.self_attn.q_proj.bias"),
        ("llama-biases", {"mlp_bias": False}, BadInputError, "unexpected: model.layers.0.mlp.gate_proj.bias"),
        ("llama", {"partial_rotary_factor": 0.5}, UnsupportedModelError, "partial_rotary_factor = 0.5"),
        ("ministral", {"layer_types": ["chunked_attention"] * 2}, UnsupportedModelError, "chunked_attention"),
        ("ministral", {"layer_types": ["full_attention"]}, BadInputError, "1 layer_types for 2 layers"),
        ("ministral", {"sliding_window": None}, BadInputError, "sliding_attention layers and no sliding_window"),
        ("mistral", {"sliding_window": 0}, BadInputError, "sliding_window = 0"),
        ("qwen2", {"use_mrope": True}, UnsupportedModelError, "use_mrope = True"),
        ("qwen2", {"rope_parameters": {"rope_type": "mrope"}}, UnsupportedModelError, "'mrope'"),
        ("gemma2", {"use_bidirectional_attention": True}, UnsupportedModelError, "use_bidirectional_attention = True"),
        ("gemma3", {"use_bidirectional_attention": True}, UnsupportedModelError, "use_bidirectional_attention = True"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, UnsupportedModelError, "attn_logit_softcapping = 50.0"),
        ("gpt2", {"add_cross_attention": True}, UnsupportedModelError, "add_cross_attention = True"),
        ("gpt2", {"n_head": 5}, BadInputError, "5 heads for 64 features"),
    ],
)
def test_what_is_not_built_is_refused_and_named(
    checkpoint: Callable[..., Checkpoint], name: str, changes: dict[str, Any], error: type[TrtllmError], message: str
) -> None:
    with pytest.raises(error, match=message):
        graph_hash(checkpoint(name, **changes))


def test_keys_that_nothing_reads_are_named(checkpoint: Callable[..., Checkpoint]) -> None:
    given = checkpoint("llama", residual_multiplier=0.5, torch_dtype="float32")
    notes = compile_network(given, build_config({"max_seq_len": 16})).notes
    assert "config.json keys without a use here: residual_multiplier" in notes
    assert not any("without a use" in note for note in compile_network(checkpoint("llama"), build_config({})).notes)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        (None, 64),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 64),
    ],
)
def test_scaling_tells_how_long_a_sequence_may_get(
    checkpoint: Callable[..., Checkpoint], rope: dict[str, Any] | None, longest: int
) -> None:
    given = checkpoint("llama", rope_parameters=rope)
    assert resolve(build_config({"max_seq_len": longest}), given).max_seq_len == longest
    with pytest.raises(UsageError, match=f"max_seq_len {longest + 1} exceeds the {longest} positions"):
        resolve(build_config({"max_seq_len": longest + 1}), given)


def test_dynamic_scaling_has_no_longest_sequence(checkpoint: Callable[..., Checkpoint]) -> None:
    given = checkpoint("llama-dynamic")
    assert resolve(build_config({"max_seq_len": 100000}), given).max_seq_len == 100000
