"""Rebuilds config.json of the Hugging Face model from GGUF metadata, a function for each family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trtllm.errors import BadInputError
from trtllm.frontends.gguf.architectures import GgufArchitecture
from trtllm.frontends.gguf.container import GgufContainer
from trtllm.frontends.gguf.metadata import Metadata
from trtllm.frontends.gguf.rotary import rotary_scaling

_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
"""The models whose attention scale is of hidden size / heads, not of the head size (llama.cpp tells them so too)."""


def build_config(container: GgufContainer, architecture: GgufArchitecture) -> dict[str, Any]:
    """config.json with the keys of `architecture`. Raises BadInputError naming a metadata key that is missing."""
    name = container.metadata["general.architecture"]
    metadata = Metadata(container.path, container.metadata, name)
    common = {"architectures": [architecture.hf_class], "model_type": architecture.model_type, "torch_dtype": "float32"}
    return common | _FAMILIES[name](metadata, container) | _token_ids(metadata.under("tokenizer.ggml"))


def _decoder(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    """What all decoders with rotary positions share."""
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    if heads == 0:
        raise BadInputError(f"{metadata.path} has a model of 0 attention heads", "the file is damaged")
    kv_heads = metadata.optional_integer("attention.head_count_kv")
    return {
        "vocab_size": _rows(container, "token_embd.weight"),
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": metadata.optional_integer("attention.key_length") or hidden // heads,
        "max_position_embeddings": metadata.integer("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.optional_number("rope.freq_base") or 10000.0,
        "rope_scaling": rotary_scaling(metadata, container),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in container.tensors,
    }


def _llama(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    config = _decoder(metadata, container)
    rotary = metadata.optional_integer("rope.dimension_count")
    if metadata.optional_integer("attention.key_length") is None and rotary:
        config["head_dim"] = rotary
    if metadata.optional_integer("expert_count"):
        return config | {
            "num_local_experts": metadata.integer("expert_count"),
            "num_experts_per_tok": metadata.integer("expert_used_count"),
        }
    return config | {
        "attention_bias": "blk.0.attn_q.bias" in container.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in container.tensors,
    }


def _qwen2(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    return _decoder(metadata, container) | {"use_sliding_window": False}


def _qwen3(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    return _qwen2(metadata, container) | {"attention_bias": "blk.0.attn_q.bias" in container.tensors}


def _qwen3moe(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    return _qwen3(metadata, container) | {
        "num_experts": metadata.integer("expert_count"),
        "num_experts_per_tok": metadata.integer("expert_used_count"),
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _gemma(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    config = _decoder(metadata, container)
    is_27b = config["num_hidden_layers"] == _GEMMA_27B_LAYERS[metadata.prefix]
    per_head = config["hidden_size"] // config["num_attention_heads"]
    config |= {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if is_27b else config["head_dim"],
        "sliding_window": metadata.optional_integer("attention.sliding_window"),
        "attn_logit_softcapping": metadata.optional_number("attn_logit_softcapping"),
        "final_logit_softcapping": metadata.optional_number("final_logit_softcapping"),
        "attention_bias": False,
    }
    return config | {"hidden_act": "gelu_pytorch_tanh"}


def _gemma2(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    config = _gemma(metadata, container)
    return config | {"layer_types": _layer_types(config["num_hidden_layers"], 2)}


def _gemma3(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    config = _gemma(metadata, container)
    pattern = metadata.optional_integer("attention.sliding_window_pattern") or 6
    return config | {
        "rope_theta": metadata.optional_number("rope.freq_base") or 1e6,
        "rope_local_base_freq": metadata.optional_number("rope.freq_base_swa") or 10000.0,
        "sliding_window_pattern": pattern,
        "layer_types": _layer_types(config["num_hidden_layers"], pattern),
    }


def _layer_types(layers: int, pattern: int) -> list[str]:
    """Every `pattern`-th layer attends to everything, the others to a window."""
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]


def _phi3(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    config = _decoder(metadata, container)
    rotary = metadata.optional_integer("rope.dimension_count") or config["head_dim"]
    original = metadata.optional_integer("rope.scaling.original_context_length")
    return config | {
        "partial_rotary_factor": rotary / config["head_dim"],
        "sliding_window": metadata.optional_integer("attention.sliding_window") or None,
        "original_max_position_embeddings": original or config["max_position_embeddings"],
    }


def _gpt2(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    return {
        "vocab_size": _rows(container, "token_embd.weight"),
        "n_embd": metadata.integer("embedding_length"),
        "n_inner": metadata.optional_integer("feed_forward_length"),
        "n_layer": metadata.integer("block_count"),
        "n_head": metadata.integer("attention.head_count"),
        "n_positions": metadata.integer("context_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in container.tensors,
    }


def _bert(metadata: Metadata, container: GgufContainer) -> dict[str, Any]:
    return {
        "vocab_size": _rows(container, "token_embd.weight"),
        "type_vocab_size": _rows(container, "token_types.weight"),
        "hidden_size": metadata.integer("embedding_length"),
        "intermediate_size": metadata.integer("feed_forward_length"),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": metadata.integer("attention.head_count"),
        "max_position_embeddings": _rows(container, "position_embd.weight"),
        "layer_norm_eps": metadata.number("attention.layer_norm_epsilon"),
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
    }


_FAMILIES: Mapping[str, Callable[[Metadata, GgufContainer], dict[str, Any]]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "qwen3moe": _qwen3moe, "gemma2": _gemma2, "gemma3": _gemma3,
    "phi3": _phi3, "gpt2": _gpt2, "bert": _bert,
}  # fmt: skip


def _token_ids(tokenizer: Metadata) -> dict[str, Any]:
    """Ids that the file lacks are None: left out, a reader would put its class's defaults."""
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    return {name: tokenizer.optional_integer(key) for name, key in keys.items()}


def _rows(container: GgufContainer, name: str) -> int:
    tensor = container.tensors.get(name)
    if tensor is None or len(tensor.shape) != 2:
        raise BadInputError(
            f"{container.path} has no matrix '{name}'", "the file is incomplete; convert the model again"
        )
    return tensor.shape[0]
