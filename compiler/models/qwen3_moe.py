"""Qwen 3 MoE: Qwen 3 with a mixture of experts in all layers but those that the config keeps dense."""

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
from trtllm.compiler.models.experts import Mixture, mixture_of_experts
from trtllm.compiler.models.model_config import ModelConfig


def build(m: ModelBuilder) -> Network:
    """transformers' Qwen3MoeForCausalLM."""
    config, shape = m.config, attention_shape(m.config)
    mixture, norm = _mixture(config), HeadNorm(config.number("rms_norm_eps", 1e-6))
    bias, window, sparse = config.flag("attention_bias"), _window(config), _sparse_layers(config)

    def attention(x: ir.Value, layer: LayerContext) -> ir.Value:
        return self_attention(m, x, layer, shape, window=window, bias=bias, head_norm=norm)

    def feed_forward(x: ir.Value, layer: LayerContext) -> ir.Value:
        if layer.index in sparse:
            return mixture_of_experts(m, x, f"{layer.name}.mlp", mixture)
        return gated_mlp(m, x, f"{layer.name}.mlp", mixture.activation)

    return pre_norm_decoder(m, shape, attention, feed_forward)


def _mixture(config: ModelConfig) -> Mixture:
    """Published configs call the number of experts `num_experts`, transformers 5 saves `num_local_experts`."""
    return Mixture(
        hidden=config.integer("hidden_size"),
        experts=config.integer("num_experts", config.integer("num_local_experts", 128)),
        width=config.integer("moe_intermediate_size", 768),
        top_k=config.integer("num_experts_per_tok", 8),
        normalize=config.flag("norm_topk_prob"),
        activation=config.activation("hidden_act", "silu"),
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
    )


def _window(config: ModelConfig) -> int:
    """Every layer slides where `use_sliding_window` is set; `max_window_layers` has no meaning in this family."""
    given = config.sliding_window(4096)
    config.get("max_window_layers")
    return given or 0 if config.flag("use_sliding_window") else 0


def _sparse_layers(config: ModelConfig) -> frozenset[int]:
    """Layers with experts: every `decoder_sparse_step`-th, without `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    layers = range(config.integer("num_hidden_layers"))
    return frozenset(layer for layer in layers if layer not in dense and (layer + 1) % step == 0)
