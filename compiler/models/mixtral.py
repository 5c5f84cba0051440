"""Mixtral: Mistral whose feed-forward block is a mixture of experts, routed top-k with weights that sum to 1."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.decoder import LayerContext, attention_shape, pre_norm_decoder, self_attention
from trtllm.compiler.models.experts import Mixture, mixture_of_experts
from trtllm.compiler.models.rotary import rotary_config


def build(m: ModelBuilder) -> Network:
    """transformers' MixtralForCausalLM."""
    config, shape = m.config, attention_shape(m.config)
    window = config.sliding_window(None) or 0
    mixture = Mixture(
        hidden=shape.hidden,
        experts=config.integer("num_local_experts", 8),
        width=config.integer("intermediate_size"),
        top_k=config.integer("num_experts_per_tok", 2),
        normalize=True,
        activation=config.activation("hidden_act", "silu"),
        gate="w1",
        up="w3",
        down="w2",
    )

    def attention(x: ir.Value, layer: LayerContext) -> ir.Value:
        return self_attention(m, x, layer, shape, window=window)

    def feed_forward(x: ir.Value, layer: LayerContext) -> ir.Value:
        return mixture_of_experts(m, x, f"{layer.name}.block_sparse_moe", mixture)

    rotary = rotary_config(config, shape.head_size, default_theta=1e6)
    return pre_norm_decoder(m, shape, attention, feed_forward, rotary, epsilon=1e-5)
