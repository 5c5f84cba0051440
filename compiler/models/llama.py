"""Llama and its siblings: Mistral (sliding window), SmolLM2, TinyLlama; Qwen2 by its options."""

from __future__ import annotations

from trtllm.compiler.models.context import DecoderInputs, ModelBuilder
from trtllm.compiler.models.rotary import rotary_config
from trtllm.compiler.network import CacheLayer, Network

import onnx_ir as ir


def build(m: ModelBuilder) -> Network:
    """transformers' LlamaForCausalLM and MistralForCausalLM."""
    config = m.config
    hidden, layers = config.integer("hidden_size"), config.integer("num_hidden_layers")
    vocab, epsilon = config.integer("vocab_size"), config.number("rms_norm_eps", 1e-6)
    heads = config.integer("num_attention_heads")
    head_size = config.integer("head_dim", hidden // heads)
    rotary = m.rotary(rotary_config(config.values, head_size))

    inputs = m.decoder_inputs()
    positions = m.b.dialect("Positions", [inputs.ids, inputs.past_lengths])
    cos_sin = rotary.cos_sin(positions, inputs.lengths, inputs.past_lengths)
    x = m.embedding(inputs.ids, "model.embed_tokens", vocab, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        normed = m.rms_norm(x, f"{prefix}.input_layernorm", hidden, epsilon=epsilon)
        x = m.add(x, _attention(m, normed, inputs, cos_sin, f"{prefix}.self_attn"))
        normed = m.rms_norm(x, f"{prefix}.post_attention_layernorm", hidden, epsilon=epsilon)
        x = m.add(x, gated_mlp(m, normed, f"{prefix}.mlp"))
    x = m.rms_norm(x, "model.norm", hidden, epsilon=epsilon)
    m.logits(x, "lm_head", "model.embed_tokens", vocab, hidden, tied=config.flag("tie_word_embeddings"))
    return m.finish(
        vocab_size=vocab, hidden_size=hidden, num_layers=layers, max_positions=config.integer("max_position_embeddings")
    )


def _attention(
    m: ModelBuilder, x: ir.Value, inputs: DecoderInputs, cos_sin: tuple[ir.Value, ir.Value], name: str
) -> ir.Value:
    config = m.config
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_size = config.integer("head_dim", hidden // heads)
    kv_heads = config.integer("num_key_value_heads", heads)
    bias = config.flag("attention_bias")
    query = m.linear(x, f"{name}.q_proj", heads * head_size, hidden, bias=bias)
    key = m.linear(x, f"{name}.k_proj", kv_heads * head_size, hidden, bias=bias)
    value = m.linear(x, f"{name}.v_proj", kv_heads * head_size, hidden, bias=bias)
    query = m.rotate(query, cos_sin, heads, head_size, f"{name}.q_rotary")
    key = m.rotate(key, cos_sin, kv_heads, head_size, f"{name}.k_rotary")
    cache = CacheLayer(kv_heads, head_size, window=int(config.get("sliding_window") or 0))
    y = m.attention((query, key, value), inputs, cache, heads, scale=head_size**-0.5)
    return m.linear(y, f"{name}.o_proj", hidden, heads * head_size, bias=bias)


def gated_mlp(m: ModelBuilder, x: ir.Value, name: str, *, bias: bool | None = None) -> ir.Value:
    """down(activation(gate(x)) * up(x)), the MLP of most decoders."""
    hidden, width = m.config.integer("hidden_size"), m.config.integer("intermediate_size")
    has_bias = m.config.flag("mlp_bias") if bias is None else bias
    gate = m.linear(x, f"{name}.gate_proj", width, hidden, bias=has_bias)
    up = m.linear(x, f"{name}.up_proj", width, hidden, bias=has_bias)
    kind = m.config.activation("hidden_act", m.config.get("hidden_activation", "silu"))
    y = m.b.dialect("GatedActivation", [gate, up], name=f"{name}.act", kind=kind)
    return m.linear(y, f"{name}.down_proj", hidden, width, bias=has_bias)
