"""Mistral and Ministral: Llama without biases, with a sliding window in all layers or in those of `layer_types`."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.decoder import LayerContext, attention_shape, gated_mlp, pre_norm_decoder, self_attention


def build(m: ModelBuilder) -> Network:
    """transformers' MistralForCausalLM and MinistralForCausalLM.

    A Mistral with `layer_types` is built as its Ministral twin, as transformers recommends: its own Mistral class
    warns about the key and slides every layer.
    """
    config, shape = m.config, attention_shape(m.config)
    kind = config.activation("hidden_act", "silu")
    window = config.sliding_window(4096)
    windows = config.windows(config.integer("num_hidden_layers"), window, lambda _: window is not None)

    def attention(x: ir.Value, layer: LayerContext) -> ir.Value:
        return self_attention(m, x, layer, shape, window=windows[layer.index])

    def feed_forward(x: ir.Value, layer: LayerContext) -> ir.Value:
        return gated_mlp(m, x, f"{layer.name}.mlp", kind)

    return pre_norm_decoder(m, shape, attention, feed_forward)
