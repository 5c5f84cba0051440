"""GPT-2: learned positions, LayerNorm, matrices stored [in, out], one for query, key and value, and a plain MLP."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.checkpoints.recipes import Transpose
from trtllm.compiler.ir.network import CacheLayer, Network
from trtllm.compiler.models.context import DecoderInputs, ModelBuilder


def build(m: ModelBuilder) -> Network:
    """transformers' GPT2LMHeadModel.

    `reorder_and_upcast_attn` only chooses the order of rounding, and softmax is in float32 here anyway.
    """
    config = m.config
    config.only("add_cross_attention", False)
    hidden, layers, vocab = config.integer("n_embd"), config.integer("n_layer"), config.integer("vocab_size")
    positions, epsilon = config.integer("n_positions", 1024), config.number("layer_norm_epsilon", 1e-5)
    if hidden % config.integer("n_head"):
        raise config.problem(f"has {config.integer('n_head')} heads for {hidden} features, which is no whole ratio")
    inputs = m.decoder_inputs()
    x = m.embedding(inputs.ids, "transformer.wte", vocab, hidden)
    indices = m.b.dialect("Positions", [inputs.ids, inputs.past_lengths])
    x = m.add(x, m.embedding(indices, "transformer.wpe", positions, hidden))
    for layer in range(layers):
        name = f"transformer.h.{layer}"
        x = m.add(x, _attention(m, m.layer_norm(x, f"{name}.ln_1", hidden, epsilon=epsilon), inputs, layer))
        x = m.add(x, _mlp(m, m.layer_norm(x, f"{name}.ln_2", hidden, epsilon=epsilon), f"{name}.mlp"))
    x = m.layer_norm(x, "transformer.ln_f", hidden, epsilon=epsilon)
    m.logits(x, "lm_head", "transformer.wte", vocab, hidden, tied=config.flag("tie_word_embeddings", default=True))
    return m.finish(vocab_size=vocab, hidden_size=hidden, num_layers=layers, max_positions=positions)


def _attention(m: ModelBuilder, x: ir.Value, inputs: DecoderInputs, layer: int) -> ir.Value:
    config, name = m.config, f"transformer.h.{layer}.attn"
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    head_size = hidden // heads
    packed = _conv1d(m, x, f"{name}.c_attn", 3 * hidden, hidden)
    query, key, value = m.b.dialect("Split", [packed], name=f"{name}.c_attn.split", sizes=[hidden] * 3)
    scale = head_size**-0.5 if config.flag("scale_attn_weights", default=True) else 1.0
    if config.flag("scale_attn_by_inverse_layer_idx"):
        scale /= layer + 1
    y = m.attention((query, key, value), inputs, CacheLayer(heads, head_size), heads, scale=scale)
    return _conv1d(m, y, f"{name}.c_proj", hidden, hidden)


def _mlp(m: ModelBuilder, x: ir.Value, name: str) -> ir.Value:
    hidden = m.config.integer("n_embd")
    width = m.config.integer("n_inner", 4 * hidden)
    kind = m.config.activation("activation_function", "gelu_new")
    y = _conv1d(m, x, f"{name}.c_fc", width, hidden)
    y = m.b.dialect("Activation", [y], name=f"{name}.act", kind=kind)
    return _conv1d(m, y, f"{name}.c_proj", hidden, width)


def _conv1d(m: ModelBuilder, x: ir.Value, name: str, out_features: int, in_features: int) -> ir.Value:
    """transformers' Conv1D: a linear layer whose weight is stored [in, out]."""
    weight = m.weight(f"{name}.weight", Transpose(m.source(f"{name}.weight", in_features, out_features), (1, 0)))
    bias = m.weight(f"{name}.bias", m.source(f"{name}.bias", out_features))
    return m.b.dialect("Linear", [x, weight, bias], name=name)
