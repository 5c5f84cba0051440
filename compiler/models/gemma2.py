"""Gemma 2: norms before and after each block, scaled embeddings, soft-capped scores and logits, alternating windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import DecoderInputs, ModelBuilder
from trtllm.compiler.models.decoder import (
    AttentionShape,
    Block,
    LayerContext,
    attention_shape,
    gated_mlp,
    self_attention,
)
from trtllm.compiler.models.model_config import ModelConfig
from trtllm.compiler.models.rotary import RotaryConfig, rotary_config

NORM_OFFSET = 1.0
"""Gemma's norms multiply by 1 + weight."""


def build(m: ModelBuilder) -> Network:
    """transformers' Gemma2ForCausalLM."""
    config, shape = m.config, gemma_attention_shape(m.config)
    config.only("use_bidirectional_attention", False)
    shape = replace(shape, softcap=config.nullable("attn_logit_softcapping", 50.0) or 0.0)
    layers, bias = config.integer("num_hidden_layers"), config.flag("attention_bias")
    windows = config.windows(layers, config.sliding_window(4096), lambda layer: layer % 2 == 0)

    def attention(x: ir.Value, layer: LayerContext) -> ir.Value:
        return self_attention(m, x, layer, shape, window=windows[layer.index], bias=bias)

    rotary = rotary_config(config, shape.head_size)
    softcap = config.nullable("final_logit_softcapping", 30.0) or 0.0
    return sandwich_decoder(m, shape, attention, dict.fromkeys(windows, rotary), windows, softcap=softcap)


def gemma_attention_shape(config: ModelConfig) -> AttentionShape:
    """Sizes of a Gemma attention, whose scale is a number of the config."""
    shape = attention_shape(config, head_size=256)
    return replace(shape, scale=config.number("query_pre_attn_scalar", 256) ** -0.5)


def sandwich_decoder(
    m: ModelBuilder,
    shape: AttentionShape,
    attention: Block,
    rotary: Mapping[int, RotaryConfig],
    windows: tuple[int, ...],
    *,
    softcap: float,
) -> Network:
    """Gemma's stack: x += norm(attention(norm(x))), x += norm(mlp(norm(x))) in each layer, a norm and the head.

    `rotary` has the parameters of each window: Gemma 3 turns its sliding layers by another base.
    """
    config, hidden = m.config, shape.hidden
    vocab, epsilon = config.integer("vocab_size"), config.number("rms_norm_eps", 1e-6)
    kind = config.activation("hidden_activation", "gelu_pytorch_tanh")
    inputs = m.decoder_inputs()
    cos_sin = _cos_sin(m, inputs, rotary)
    x = m.embedding(inputs.ids, "model.embed_tokens", vocab, hidden, scale=hidden**0.5)

    def norm(value: ir.Value, name: str) -> ir.Value:
        return m.rms_norm(value, name, hidden, epsilon=epsilon, offset=NORM_OFFSET)

    for index, window in enumerate(windows):
        layer = LayerContext(index, inputs, cos_sin[window])
        y = attention(norm(x, f"{layer.name}.input_layernorm"), layer)
        x = m.add(x, norm(y, f"{layer.name}.post_attention_layernorm"))
        y = gated_mlp(m, norm(x, f"{layer.name}.pre_feedforward_layernorm"), f"{layer.name}.mlp", kind)
        x = m.add(x, norm(y, f"{layer.name}.post_feedforward_layernorm"))
    tied = config.flag("tie_word_embeddings", default=True)
    m.logits(norm(x, "model.norm"), "lm_head", "model.embed_tokens", vocab, hidden, tied=tied, softcap=softcap)
    return m.finish(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=len(windows),
        max_positions=config.integer("max_position_embeddings"),
    )


def _cos_sin(
    m: ModelBuilder, inputs: DecoderInputs, rotary: Mapping[int, RotaryConfig]
) -> dict[int, tuple[ir.Value, ir.Value]]:
    """Cosines and sines by window; equal parameters share one table."""
    positions = m.b.dialect("Positions", [inputs.ids, inputs.past_lengths])
    distinct: list[RotaryConfig] = []
    for config in rotary.values():
        if config not in distinct:
            distinct.append(config)
    names = ["rotary", *(f"rotary_{number}" for number in range(1, len(distinct)))]
    made = [
        m.rotary(config, name).cos_sin(positions, inputs.lengths, inputs.past_lengths)
        for config, name in zip(distinct, names, strict=True)
    ]
    return {window: made[distinct.index(config)] for window, config in rotary.items()}
