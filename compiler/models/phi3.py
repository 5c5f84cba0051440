"""Phi-3 and Phi-4-mini: Llama with one matrix for query, key and value, one for gate and up, and partial rotation."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.decoder import LayerContext, attention_shape, pre_norm_decoder, rotary_attention
from trtllm.compiler.models.rotary import rotary_config

_ORIGINAL_POSITIONS = 4096
"""What an absent original_max_position_embeddings means to transformers' Phi3Config."""


def build(m: ModelBuilder) -> Network:
    """transformers' Phi3ForCausalLM."""
    config, shape = m.config, attention_shape(m.config)
    kind, width = config.activation("hidden_act", "silu"), config.integer("intermediate_size")
    layers, window = config.integer("num_hidden_layers"), config.sliding_window(None)
    windows = config.windows(layers, window, lambda _: window is not None)
    rotary = rotary_config(
        config, shape.head_size, partial=True, original_positions=_ORIGINAL_POSITIONS, aliases={"yarn": "longrope"}
    )

    def attention(x: ir.Value, layer: LayerContext) -> ir.Value:
        name = f"{layer.name}.self_attn"
        sizes = [shape.query_width, shape.kv_width, shape.kv_width]
        packed = m.linear(x, f"{name}.qkv_proj", sum(sizes), shape.hidden)
        qkv = m.b.dialect("Split", [packed], name=f"{name}.qkv_proj.split", sizes=sizes)
        y = rotary_attention(m, qkv, layer, shape, window=windows[layer.index])
        return m.linear(y, f"{name}.o_proj", shape.hidden, shape.query_width)

    def feed_forward(x: ir.Value, layer: LayerContext) -> ir.Value:
        name = f"{layer.name}.mlp"
        packed = m.linear(x, f"{name}.gate_up_proj", 2 * width, shape.hidden)
        y = m.b.dialect("GatedActivation", [packed], name=f"{name}.act", kind=kind)
        return m.linear(y, f"{name}.down_proj", shape.hidden, width)

    return pre_norm_decoder(m, shape, attention, feed_forward, rotary, epsilon=1e-5)
