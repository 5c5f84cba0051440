"""Blocks that decoder families share: rotary self-attention, the gated MLP, and the pre-norm stack around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.network import CacheLayer, Network
from trtllm.compiler.models.context import DecoderInputs, ModelBuilder
from trtllm.compiler.models.model_config import ModelConfig
from trtllm.compiler.models.rotary import RotaryConfig, rotary_config


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and scale of a family's attention."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    softcap: float = 0.0

    @property
    def query_width(self) -> int:
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_size


@dataclass(frozen=True)
class HeadNorm:
    """The RMSNorm of each query and key head, `q_norm` and `k_norm`."""

    epsilon: float
    offset: float = 0.0


@dataclass(frozen=True)
class LayerContext:
    """What a layer reads beside its states."""

    index: int
    inputs: DecoderInputs
    cos_sin: tuple[ir.Value, ir.Value]

    @property
    def name(self) -> str:
        return f"model.layers.{self.index}"


Block = Callable[[ir.Value, LayerContext], ir.Value]
"""Normed states [B, S, H] to what is added to the residual."""


def attention_shape(config: ModelConfig, *, head_size: int | None = None) -> AttentionShape:
    """The sizes of a Llama-like attention; `head_size` is what an absent head_dim means, hidden / heads by default."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.problem(f"has {heads} attention heads for {kv_heads} key-value heads, which is no whole ratio")
    size = config.integer("head_dim", head_size or hidden // heads)
    return AttentionShape(hidden, heads, kv_heads, size, scale=size**-0.5)


def self_attention(
    m: ModelBuilder,
    x: ir.Value,
    context: LayerContext,
    shape: AttentionShape,
    *,
    window: int = 0,
    bias: bool = False,
    output_bias: bool | None = None,
    head_norm: HeadNorm | None = None,
) -> ir.Value:
    """Rotary attention with its own q, k, v and output projections; head norms come before the rotation."""
    name = f"{context.name}.self_attn"
    query = m.linear(x, f"{name}.q_proj", shape.query_width, shape.hidden, bias=bias)
    key = m.linear(x, f"{name}.k_proj", shape.kv_width, shape.hidden, bias=bias)
    value = m.linear(x, f"{name}.v_proj", shape.kv_width, shape.hidden, bias=bias)
    if head_norm is not None:
        epsilon, offset = head_norm.epsilon, head_norm.offset
        query = m.head_rms_norm(query, f"{name}.q_norm", shape.head_size, shape.heads, epsilon=epsilon, offset=offset)
        key = m.head_rms_norm(key, f"{name}.k_norm", shape.head_size, shape.kv_heads, epsilon=epsilon, offset=offset)
    y = rotary_attention(m, (query, key, value), context, shape, window=window)
    with_bias = bias if output_bias is None else output_bias
    return m.linear(y, f"{name}.o_proj", shape.hidden, shape.query_width, bias=with_bias)


def rotary_attention(
    m: ModelBuilder,
    qkv: tuple[ir.Value, ir.Value, ir.Value],
    context: LayerContext,
    shape: AttentionShape,
    *,
    window: int = 0,
) -> ir.Value:
    """Rotates query and key over the width of the layer's tables and attends through the layer's cache."""
    query, key, value = qkv
    name = f"{context.name}.self_attn"
    rotary_size = 2 * int(dims(context.cos_sin[0])[-1])
    query = m.rotate(query, context.cos_sin, shape.heads, rotary_size, f"{name}.q_rotary")
    key = m.rotate(key, context.cos_sin, shape.kv_heads, rotary_size, f"{name}.k_rotary")
    cache = CacheLayer(shape.kv_heads, shape.head_size, window=window)
    return m.attention(
        (query, key, value), context.inputs, cache, shape.heads, scale=shape.scale, softcap=shape.softcap
    )


def gated_mlp(m: ModelBuilder, x: ir.Value, name: str, kind: str, *, bias: bool = False) -> ir.Value:
    """down(activation(gate(x)) * up(x)), the MLP of most decoders; `kind` names the activation."""
    hidden, width = m.config.integer("hidden_size"), m.config.integer("intermediate_size")
    gate = m.linear(x, f"{name}.gate_proj", width, hidden, bias=bias)
    up = m.linear(x, f"{name}.up_proj", width, hidden, bias=bias)
    y = m.b.dialect("GatedActivation", [gate, up], name=f"{name}.act", kind=kind)
    return m.linear(y, f"{name}.down_proj", hidden, width, bias=bias)


def pre_norm_decoder(
    m: ModelBuilder, shape: AttentionShape, attention: Block, feed_forward: Block, rotary: RotaryConfig | None = None,
    *, epsilon: float = 1e-6,
) -> Network:  # fmt: skip
    """Llama's stack: x += attention(norm(x)), x += feed_forward(norm(x)) in each layer, a norm and the head.

    `epsilon` is what an absent rms_norm_eps means; `rotary` replaces the config's own rotary parameters.
    """
    config = m.config
    layers, vocab = config.integer("num_hidden_layers"), config.integer("vocab_size")
    epsilon = config.number("rms_norm_eps", epsilon)
    inputs = m.decoder_inputs()
    positions = m.b.dialect("Positions", [inputs.ids, inputs.past_lengths])
    tables = m.rotary(rotary or rotary_config(config, shape.head_size))
    cos_sin = tables.cos_sin(positions, inputs.lengths, inputs.past_lengths)
    x = m.embedding(inputs.ids, "model.embed_tokens", vocab, shape.hidden)
    for index in range(layers):
        layer = LayerContext(index, inputs, cos_sin)
        normed = m.rms_norm(x, f"{layer.name}.input_layernorm", shape.hidden, epsilon=epsilon)
        x = m.add(x, attention(normed, layer))
        normed = m.rms_norm(x, f"{layer.name}.post_attention_layernorm", shape.hidden, epsilon=epsilon)
        x = m.add(x, feed_forward(normed, layer))
    x = m.rms_norm(x, "model.norm", shape.hidden, epsilon=epsilon)
    tied = config.flag("tie_word_embeddings")
    m.logits(x, "lm_head", "model.embed_tokens", vocab, shape.hidden, tied=tied)
    return m.finish(
        vocab_size=vocab,
        hidden_size=shape.hidden,
        num_layers=layers,
        max_positions=config.integer("max_position_embeddings"),
    )
