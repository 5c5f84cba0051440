"""Qwen 2 and 2.5: Llama with biases on query, key and value, and a sliding window from some layer on."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.decoder import LayerContext, attention_shape, gated_mlp, pre_norm_decoder, self_attention
from trtllm.compiler.models.model_config import ModelConfig


def build(m: ModelBuilder) -> Network:
    """transformers' Qwen2ForCausalLM."""
    config, shape = m.config, attention_shape(m.config)
    config.only("use_mrope", False)
    kind = config.activation("hidden_act", "silu")
    windows = qwen_windows(config)

    def attention(x: ir.Value, layer: LayerContext) -> ir.Value:
        return self_attention(m, x, layer, shape, window=windows[layer.index], bias=True, output_bias=False)

    def feed_forward(x: ir.Value, layer: LayerContext) -> ir.Value:
        return gated_mlp(m, x, f"{layer.name}.mlp", kind)

    return pre_norm_decoder(m, shape, attention, feed_forward)


def qwen_windows(config: ModelConfig) -> tuple[int, ...]:
    """Layers from `max_window_layers` on slide, where `use_sliding_window` is set and `layer_types` says no other."""
    given, first = config.sliding_window(4096), config.get("max_window_layers", 28)
    window = given if config.flag("use_sliding_window") else None
    return config.windows(
        config.integer("num_hidden_layers"), window, lambda layer: window is not None and layer >= first
    )
