"""config.json of the project's checkpoint format: the reference tool's keys, and the model's own config beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtllm.checkpoints.trtllm_layout import family_of
from trtllm.checkpoints.trtllm_shards import Heads
from trtllm.checkpoints.trtllm_tensors import Layout, RankMapping
from trtllm.errors import BadInputError, UnsupportedModelError

SOURCE_CONFIG = "source_config"
"""The key with the Hugging Face config that the model came with: scalings, soft caps, windows, all that it says."""
_ALIASES = {
    "hidden_size": ("n_embd", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "hidden_dim"),
    "max_position_embeddings": ("n_positions",),
    "norm_epsilon": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "hidden_act": ("hidden_activation", "activation_function", "activation"),
    "rotary_scaling": ("rope_scaling", "rope_parameters"),
    "head_size": ("head_dim",),
    "rotary_base": ("rope_theta",),
}
"""Keys of the format to the names that families give them."""
_BACK = {
    "hidden_size": "hidden_size", "num_hidden_layers": "num_hidden_layers", "vocab_size": "vocab_size",
    "num_attention_heads": "num_attention_heads", "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim", "intermediate_size": "intermediate_size", "hidden_act": "hidden_act",
    "max_position_embeddings": "max_position_embeddings", "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta", "rotary_scaling": "rope_scaling", "attn_bias": "attention_bias",
    "mlp_bias": "mlp_bias", "share_embedding_table": "tie_word_embeddings",
}  # fmt: skip
_READ_WITHOUT_SOURCE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures of which the reference's own keys say everything."""
_HEAD_SIZES = {"Gemma2ForCausalLM": 256, "Gemma3ForCausalLM": 256}
"""What an absent head_dim means, where it is not hidden size over heads."""
_TIED = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel")
"""Where an absent tie_word_embeddings means yes."""


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """The value of one of the format's keys in a Hugging Face config, None when it has none."""
    return next((config[name] for name in (key, *_ALIASES.get(key, ())) if config.get(name) is not None), None)


def layout_of(
    architecture: str,
    config: Mapping[str, Any],
    source: str,
    mapping: RankMapping | None = None,
    *,
    parallel_embedding: bool = False,
) -> Layout:
    """The shape of a checkpoint of a Hugging Face config. Raises BadInputError when sizes are missing."""
    sizes = {
        key: value_of(config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    }
    wrong = [key for key, value in sizes.items() if type(value) is not int or value <= 0]
    if wrong:
        raise BadInputError(f"config.json of {source} lacks {', '.join(wrong)}", "take the config of the model")
    query = sizes["num_attention_heads"]
    head_size = value_of(config, "head_size") or _HEAD_SIZES.get(architecture, sizes["hidden_size"] // query)
    heads = Heads(query, value_of(config, "num_key_value_heads") or query, head_size)
    experts = config.get("num_local_experts") or config.get("num_experts") or {"MixtralForCausalLM": 8}.get(
        architecture, 128
    )  # fmt: skip
    return Layout(
        family_of(architecture, source), sizes["num_hidden_layers"], heads, sizes["vocab_size"],
        mapping or RankMapping(), parallel_embedding, experts,
    )  # fmt: skip


def is_tied(architecture: str, config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding's matrix."""
    tied = config.get("tie_word_embeddings")
    return bool(tied) if tied is not None else architecture in _TIED


def format_config(architecture: str, config: Mapping[str, Any], dtype: str, layout: Layout) -> dict[str, Any]:
    """config.json for a model whose Hugging Face config is `config`."""
    hidden, mapping = value_of(config, "hidden_size"), layout.mapping
    rope = value_of(config, "rotary_scaling")
    base = value_of(config, "rotary_base") or (rope or {}).get("rope_theta")
    has_learned = layout.family.first[-1].ours != "transformer.vocab_embedding"
    return {
        "architecture": architecture,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": layout.vocab_size,
        "max_position_embeddings": value_of(config, "max_position_embeddings"),
        "hidden_size": hidden,
        "num_hidden_layers": layout.num_layers,
        "num_attention_heads": layout.heads.query,
        "num_key_value_heads": layout.heads.key_value,
        "head_size": layout.heads.size,
        "qk_layernorm": architecture in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM"),
        "hidden_act": value_of(config, "hidden_act"),
        "intermediate_size": value_of(config, "intermediate_size") or 4 * hidden,
        "norm_epsilon": value_of(config, "norm_epsilon"),
        "position_embedding_type": "learned_absolute" if has_learned else "rope_gpt_neox",
        **({} if has_learned else {"rotary_base": base, "rotary_scaling": rope}),
        "use_parallel_embedding": layout.parallel_embedding,
        "embedding_sharding_dim": 0,
        "share_embedding_table": is_tied(architecture, config),
        "mapping": {
            "world_size": mapping.world_size,
            "tp_size": mapping.tp_size,
            "pp_size": mapping.pp_size,
            "cp_size": 1,
            "moe_tp_size": mapping.tp_size,
            "moe_ep_size": 1,
            "gpus_per_node": 8,
        },
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
        SOURCE_CONFIG: dict(config),
    }


def read_mapping(config: Mapping[str, Any], source: str) -> RankMapping:
    """Raises UnsupportedModelError for context-parallel or expert-parallel files, BadInputError for nonsense."""
    given = config.get("mapping") or {}
    values = {key: given.get(key, 1) for key in ("tp_size", "pp_size", "cp_size", "moe_ep_size")}
    if any(type(value) is not int for value in values.values()) or min(values["tp_size"], values["pp_size"]) < 1:
        raise BadInputError(f"config.json of {source} has the mapping {given}", "convert the model again")
    if values["cp_size"] > 1 or values["moe_ep_size"] > 1:
        raise UnsupportedModelError(f"{source} is split by context or by experts", "convert it by --tp-size")
    return RankMapping(values["tp_size"], values["pp_size"])


def read_source_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The Hugging Face config of a checkpoint: the one it carries, or what the reference's keys say.

    Raises UnsupportedModelError for quantized weights and for what those keys cannot say.
    """
    architecture, quantization = config.get("architecture"), config.get("quantization") or {}
    if not isinstance(architecture, str):
        raise BadInputError(f"config.json of {source} names no architecture", "convert the model again")
    if quantization.get("quant_algo") not in (None, "NO_QUANT"):
        raise UnsupportedModelError(
            f"{source} holds weights of quantization {quantization['quant_algo']}, packed for the reference's kernels",
            "convert the model without quantization; the build quantizes",
        )
    carried = config.get(SOURCE_CONFIG)
    if isinstance(carried, dict):
        _check_agreement(config, carried, architecture, source)
        return carried
    if architecture not in _READ_WITHOUT_SOURCE:
        raise UnsupportedModelError(
            f"{source}: config.json says of a {architecture} only what the reference's keys can",
            f"without '{SOURCE_CONFIG}' are read: {', '.join(_READ_WITHOUT_SOURCE)}; convert the original model",
        )
    derived = {theirs: config[ours] for ours, theirs in _BACK.items() if config.get(ours) is not None}
    return {"architectures": [architecture], **derived}


def _check_agreement(config: Mapping[str, Any], carried: Mapping[str, Any], architecture: str, source: str) -> None:
    layout = layout_of(architecture, carried, source)
    expected = {
        "num_hidden_layers": layout.num_layers, "vocab_size": layout.vocab_size,
        "num_attention_heads": layout.heads.query, "num_key_value_heads": layout.heads.key_value,
        "head_size": layout.heads.size, "hidden_size": value_of(carried, "hidden_size"),
    }  # fmt: skip
    wrong = [
        f"{key} {config[key]} against {value}" for key, value in expected.items() if config.get(key, value) != value
    ]
    if wrong:
        raise BadInputError(
            f"config.json of {source} contradicts its own '{SOURCE_CONFIG}': {', '.join(wrong)}",
            "change both, or convert the model again",
        )
