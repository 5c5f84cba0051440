"""BERT and the encoders that differ from it in names only: RoBERTa, XLM-RoBERTa, DistilBERT."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from trtllm.checkpoints.recipes import Reshape, Slice
from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.encoder import EncoderInputs, EncoderShape, encoder_inputs, finish_encoder
from trtllm.dtypes import DType


@dataclass(frozen=True)
class _LayerNames:
    """Names of a layer's tensors below `stem`.<index>."""

    stem: str
    query: str
    key: str
    value: str
    attended: str
    attention_norm: str
    widen: str
    narrow: str
    output_norm: str


_BERT = _LayerNames(
    "encoder.layer", "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip
_DISTILBERT = _LayerNames(
    "transformer.layer", "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin",
    "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm",
)  # fmt: skip


@dataclass(frozen=True)
class _Encoder:
    """One family member: sizes, names, and where it departs from BERT."""

    shape: EncoderShape
    names: _LayerNames
    activation: str
    epsilon: float
    first_position: int = 0
    """Row of the position table that the first token takes."""
    has_token_types: bool = True


def build_bert(m: ModelBuilder) -> Network:
    """transformers' BertModel with token types 0; its pooler is left out."""
    return _build(m, _bert_like(m, first_position=0))


def build_roberta(m: ModelBuilder) -> Network:
    """transformers' RobertaModel and XLMRobertaModel, whose positions start after that of the padding token."""
    padding = m.config.get("pad_token_id")
    return _build(m, _bert_like(m, first_position=(1 if padding is None else int(padding)) + 1))


def build_distilbert(m: ModelBuilder) -> Network:
    """transformers' DistilBertModel: BERT without token types, under other names."""
    config = m.config
    config.get("sinusoidal_pos_embds")  # the table is stored like any other
    shape = EncoderShape(
        vocab=config.integer("vocab_size"),
        hidden=config.integer("dim", 768),
        layers=config.integer("n_layers", 6),
        heads=config.integer("n_heads", 12),
        width=config.integer("hidden_dim", 3072),
        positions=config.integer("max_position_embeddings", 512),
    )
    activation = config.activation("activation", "gelu")
    return _build(m, _Encoder(shape, _DISTILBERT, activation, epsilon=1e-12, has_token_types=False))


def _bert_like(m: ModelBuilder, first_position: int) -> _Encoder:
    config = m.config
    config.only("position_embedding_type", "absolute")
    config.only("is_decoder", False)
    shape = EncoderShape(
        vocab=config.integer("vocab_size"),
        hidden=config.integer("hidden_size"),
        layers=config.integer("num_hidden_layers"),
        heads=config.integer("num_attention_heads"),
        width=config.integer("intermediate_size"),
        positions=config.integer("max_position_embeddings", 512) - first_position,
    )
    activation = config.activation("hidden_act", "gelu")
    return _Encoder(shape, _BERT, activation, config.number("layer_norm_eps", 1e-12), first_position)


def _build(m: ModelBuilder, encoder: _Encoder) -> Network:
    shape = encoder.shape
    if shape.hidden % shape.heads:
        raise m.config.problem(f"has {shape.heads} heads for {shape.hidden} features, which is no whole ratio")
    inputs = encoder_inputs(m)
    x = _embeddings(m, inputs, encoder)
    for index in range(shape.layers):
        x = _layer(m, x, inputs, encoder, f"{encoder.names.stem}.{index}")
    for name in m.checkpoint.tensors:
        if name.startswith("pooler."):
            m.ignore(name)
    return finish_encoder(m, x, inputs, shape)


def _embeddings(m: ModelBuilder, inputs: EncoderInputs, encoder: _Encoder) -> ir.Value:
    """LayerNorm(words[ids] + (positions[0 .. S] + types[0]))."""
    shape = encoder.shape
    words = m.embedding(inputs.ids, "embeddings.word_embeddings", shape.vocab, shape.hidden)
    rows = _position_rows(m, inputs, encoder)
    if encoder.has_token_types:
        name = "embeddings.token_type_embeddings.weight"
        table = m.source(name, m.config.integer("type_vocab_size", 2), shape.hidden)
        first = m.weight(f"{name}_of_type_0", Reshape(Slice(table, 0, 0, 1), (shape.hidden,)))
        rows = m.add(rows, first)
    return m.layer_norm(m.add(words, rows), "embeddings.LayerNorm", shape.hidden, epsilon=encoder.epsilon)


def _position_rows(m: ModelBuilder, inputs: EncoderInputs, encoder: _Encoder) -> ir.Value:
    """The rows of the position table that the S tokens take: [S, H]."""
    name, shape, first = "embeddings.position_embeddings.weight", encoder.shape, encoder.first_position
    table = m.source(name, first + shape.positions, shape.hidden)
    usable = m.weight(name, Slice(table, 0, first, first + shape.positions) if first else table)
    count = m.b.op("Shape", [inputs.ids], (1,), DType.INT64, start=1, end=2)
    zero = m.b.constant([0])
    return m.b.op("Slice", [usable, zero, count, zero], ("sequence", shape.hidden), name="embeddings.positions")


def _layer(m: ModelBuilder, x: ir.Value, inputs: EncoderInputs, encoder: _Encoder, prefix: str) -> ir.Value:
    """x = norm(x + attention(x)); x = norm(x + narrow(activation(widen(x))))."""
    names, hidden, width = encoder.names, encoder.shape.hidden, encoder.shape.width
    attended = _attention(m, x, inputs, encoder, prefix)
    x = m.layer_norm(m.add(attended, x), f"{prefix}.{names.attention_norm}", hidden, epsilon=encoder.epsilon)
    y = m.linear(x, f"{prefix}.{names.widen}", width, hidden, bias=True)
    y = m.b.dialect("Activation", [y], name=f"{prefix}.act", kind=encoder.activation)
    y = m.linear(y, f"{prefix}.{names.narrow}", hidden, width, bias=True)
    return m.layer_norm(m.add(y, x), f"{prefix}.{names.output_norm}", hidden, epsilon=encoder.epsilon)


def _attention(m: ModelBuilder, x: ir.Value, inputs: EncoderInputs, encoder: _Encoder, prefix: str) -> ir.Value:
    names, hidden, heads = encoder.names, encoder.shape.hidden, encoder.shape.heads
    qkv = [m.linear(x, f"{prefix}.{name}", hidden, hidden, bias=True) for name in (names.query, names.key, names.value)]
    y = m.b.dialect(
        "EncoderAttention",
        [*qkv, inputs.lengths],
        name=f"{prefix}.attention",
        num_heads=heads,
        head_size=hidden // heads,
        scale=(hidden // heads) ** -0.5,
    )
    return m.linear(y, f"{prefix}.{names.attended}", hidden, hidden, bias=True)
