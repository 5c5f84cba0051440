"""Llama and the models that share its class: TinyLlama, SmolLM2, Yi, Vicuna."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.decoder import LayerContext, attention_shape, gated_mlp, pre_norm_decoder, self_attention


def build(m: ModelBuilder) -> Network:
    """transformers' LlamaForCausalLM."""
    config, shape = m.config, attention_shape(m.config)
    config.only("sliding_window")
    kind = config.activation("hidden_act", "silu")
    bias, mlp_bias = config.flag("attention_bias"), config.flag("mlp_bias")

    def attention(x: ir.Value, layer: LayerContext) -> ir.Value:
        return self_attention(m, x, layer, shape, bias=bias)

    def feed_forward(x: ir.Value, layer: LayerContext) -> ir.Value:
        return gated_mlp(m, x, f"{layer.name}.mlp", kind, bias=mlp_bias)

    return pre_norm_decoder(m, shape, attention, feed_forward)
