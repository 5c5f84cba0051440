"""Gemma 3 text: Gemma 2's blocks with head norms, no score capping, and another rotary base for sliding layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.decoder import HeadNorm, LayerContext, self_attention
from trtllm.compiler.models.gemma2 import NORM_OFFSET, gemma_attention_shape, sandwich_decoder
from trtllm.compiler.models.model_config import ModelConfig
from trtllm.compiler.models.rotary import RotaryConfig, rotary_config

_FULL, _SLIDING = "full_attention", "sliding_attention"
_THETA = {_FULL: ("rope_theta", 1e6), _SLIDING: ("rope_local_base_freq", 1e4)}
"""Where configs before transformers 5 keep each base, and what its absence means."""


def build(m: ModelBuilder) -> Network:
    """transformers' Gemma3ForCausalLM."""
    config, shape = m.config, gemma_attention_shape(m.config)
    config.only("use_bidirectional_attention", False)
    config.only("attn_logit_softcapping")
    norm, bias = HeadNorm(config.number("rms_norm_eps", 1e-6), NORM_OFFSET), config.flag("attention_bias")
    windows = _windows(config)

    def attention(x: ir.Value, layer: LayerContext) -> ir.Value:
        return self_attention(m, x, layer, shape, window=windows[layer.index], bias=bias, head_norm=norm)

    rotary = {window: _rotary(config, _SLIDING if window else _FULL, shape.head_size) for window in windows}
    softcap = config.nullable("final_logit_softcapping", None) or 0.0
    return sandwich_decoder(m, shape, attention, rotary, windows, softcap=softcap)


def _windows(config: ModelConfig) -> tuple[int, ...]:
    """Every sixth layer sees everything, unless the config has another pattern."""
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    layers = config.integer("num_hidden_layers")
    return config.windows(layers, config.sliding_window(4096), lambda layer: (layer + 1) % pattern != 0)


def _rotary(config: ModelConfig, layer_type: str, head_size: int) -> RotaryConfig:
    """Parameters of a layer type; before transformers 5 a scaling concerned the full layers only."""
    key, default = _THETA[layer_type]
    theta = config.number(key, default)
    scaling = config.get("rope_scaling") if layer_type == _FULL else None
    given: Mapping[str, Any] = (config.get("rope_parameters") or {}).get(layer_type) or {}
    return rotary_config(config, head_size, parameters={"rope_theta": theta, **given, **(scaling or {})})
