"""Qwen 3 dense: Llama with a norm on each query and key head."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.decoder import (
    HeadNorm,
    LayerContext,
    attention_shape,
    gated_mlp,
    pre_norm_decoder,
    self_attention,
)
from trtllm.compiler.models.qwen2 import qwen_windows


def build(m: ModelBuilder) -> Network:
    """transformers' Qwen3ForCausalLM."""
    config, shape = m.config, attention_shape(m.config, head_size=128)
    kind = config.activation("hidden_act", "silu")
    norm = HeadNorm(config.number("rms_norm_eps", 1e-6))
    bias, windows = config.flag("attention_bias"), qwen_windows(config)

    def attention(x: ir.Value, layer: LayerContext) -> ir.Value:
        return self_attention(m, x, layer, shape, window=windows[layer.index], bias=bias, head_norm=norm)

    def feed_forward(x: ir.Value, layer: LayerContext) -> ir.Value:
        return gated_mlp(m, x, f"{layer.name}.mlp", kind)

    return pre_norm_decoder(m, shape, attention, feed_forward)
