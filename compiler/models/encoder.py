"""What encoder families share: inputs, the pooled or unpooled output, and the finished network."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from trtllm.compiler.ir.network import ModelInfo, Network
from trtllm.compiler.models.context import IR_VERSION, ModelBuilder
from trtllm.compiler.models.pooling import pooling_of
from trtllm.dtypes import DType


@dataclass(frozen=True)
class EncoderInputs:
    """Graph inputs of an encoder: B texts of S tokens, right-padded."""

    ids: ir.Value
    """int64 [B, S]."""
    lengths: ir.Value
    """int64 [B]: valid tokens of each row."""


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    width: int
    """Of the feed-forward block."""
    positions: int
    """Tokens of the longest text."""


def encoder_inputs(m: ModelBuilder) -> EncoderInputs:
    return EncoderInputs(
        m.b.input("input_ids", DType.INT64, ("batch", "sequence")),
        m.b.input("lengths", DType.INT64, ("batch",)),
    )


def finish_encoder(m: ModelBuilder, states: ir.Value, inputs: EncoderInputs, shape: EncoderShape) -> Network:
    """The network whose output is `embedding` float32 [B, H], or unpooled `hidden_states` float32 [B, S, H].

    Raises BadInputError that lists every tensor problem at once.
    """
    m.check_tensors()
    pooling = pooling_of(m.checkpoint, m.build)
    if pooling.kind == "none":
        wide = states
        if m.dtype is not DType.FLOAT32:
            wide = m.b.op("Cast", [states], None, DType.FLOAT32, to=ir.DataType.FLOAT, name="hidden_states")
        m.b.output(wide, "hidden_states")
    else:
        pooled = m.b.dialect(
            "Pool", [states, inputs.lengths], name="pool", kind=pooling.kind, normalize=int(pooling.normalize)
        )
        m.b.output(pooled, "embedding")
    info = ModelInfo(
        kind="encoder",
        architecture=m.checkpoint.architecture,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        max_positions=shape.positions,
        embedding_size=0 if pooling.kind == "none" else shape.hidden,
    )
    return Network(ir.Model(m.graph, ir_version=IR_VERSION), info)
