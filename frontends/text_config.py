"""Finds the text model in a published config: its class name, and for a multi-modal wrapper its own config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtllm.errors import BadInputError, UnsupportedModelError
from trtllm.frontends.quantized.config import QuantizationConfig

_TEXT_ARCHITECTURES = {
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_GEMMA3_TEXT_DEFAULTS = {
    "vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    "sliding_window_pattern": 6, "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
"""Values of transformers' Gemma3TextConfig: the published wrappers leave out of `text_config` what equals them."""

_INHERITED = (
    "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    "transformers_version",
)  # fmt: skip
"""Keys that a wrapper holds at its top for the text model too."""


@dataclass(frozen=True)
class TextConfig:
    """The text model's class name and config; `wrapper` is the multi-modal class around it, if any."""

    architecture: str
    config: Mapping[str, Any]
    wrapper: str | None = None
    quantization: QuantizationConfig | None = None
    """What the config says of quantized weights."""


def find_text_config(config: Mapping[str, Any], source: str) -> TextConfig:
    """The text model of `config`. Raises BadInputError without a class name or for two quantizations."""
    quantization = _quantization(config, source)
    architecture = _architecture(config, source)
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return TextConfig(architecture, config, quantization=quantization)
    quantization = quantization or _quantization(inner, source)
    model_type = str(inner.get("model_type"))
    text_architecture = _TEXT_ARCHITECTURES.get(model_type)
    if text_architecture is None:
        raise UnsupportedModelError(
            f"{source} is a {architecture} around a text model of type '{model_type}', which is not read",
            f"text models that are read out of a wrapper: {', '.join(sorted(_TEXT_ARCHITECTURES))}",
        )
    merged = _merged(config, inner, text_architecture)
    return TextConfig(text_architecture, merged, wrapper=architecture, quantization=quantization)


def _merged(config: Mapping[str, Any], inner: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    inherited = {key: config[key] for key in _INHERITED if config.get(key) is not None}
    given = {key: value for key, value in inner.items() if value is not None or key not in inherited}
    defaults = dict(_GEMMA3_TEXT_DEFAULTS) if inner.get("model_type") == "gemma3_text" else {}
    if "layer_types" in given or "_sliding_window_pattern" in given:
        defaults.pop("sliding_window_pattern", None)
    if "rope_parameters" in given:
        for key in ("rope_theta", "rope_local_base_freq"):
            defaults.pop(key, None)
    return {**defaults, **inherited, **given, "architectures": [architecture]}


def _architecture(config: Mapping[str, Any], source: str) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    raise BadInputError(
        f"config.json of {source} names no architecture (key 'architectures')",
        'add the class the model was saved from, for example "architectures": ["LlamaForCausalLM"]',
    )


def _quantization(config: Mapping[str, Any], source: str) -> QuantizationConfig | None:
    """What `config` says of quantization. Raises BadInputError when it is no map or names no method."""
    for key in ("quantization_config", "compression_config"):
        values = config.get(key)
        if not values:
            continue
        method = values.get("quant_method") if isinstance(values, dict) else None
        if not isinstance(method, str):
            raise BadInputError(
                f"config.json of {source} has a {key} without quant_method", "the config is damaged; fetch it again"
            )
        return QuantizationConfig(_METHODS.get(method, method), values, source)
    return None


_METHODS = {"compressed_tensors": "compressed-tensors", "sparseml": "compressed-tensors"}
"""Older spellings."""
