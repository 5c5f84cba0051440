"""The operators that become layers, as "domain::Type": the target runs these and no others."""

from __future__ import annotations

from collections.abc import Mapping

from trtllm.compiler.targets.tensorrt.operators import (
    attention,
    elementwise,
    normalization,
    products,
    scaled,
    selection,
    shapes,
)
from trtllm.compiler.targets.tensorrt.operators.elementwise import Emit, activation, binary, unary
from trtllm.compiler.targets.tensorrt.operators.selection import reduction

OPERATORS: Mapping[str, Emit] = {
    # Arithmetic.
    "::Add": binary("SUM"),
    "::Sub": binary("SUB"),
    "::Mul": binary("PROD"),
    "::Div": binary("DIV"),
    "::Max": binary("MAX"),
    "::Min": binary("MIN"),
    "::Pow": binary("POW"),
    "::Reciprocal": unary("RECIP"),
    "::Sqrt": unary("SQRT"),
    "::Exp": unary("EXP"),
    "::Log": unary("LOG"),
    "::Neg": unary("NEG"),
    "::Abs": unary("ABS"),
    "::Sin": unary("SIN"),
    "::Cos": unary("COS"),
    "::Erf": unary("ERF"),
    # Comparisons and choices.
    "::Equal": binary("EQUAL"),
    "::Less": binary("LESS"),
    "::Greater": binary("GREATER"),
    "::LessOrEqual": binary("GREATER", negated=True),
    "::GreaterOrEqual": binary("LESS", negated=True),
    "::And": binary("AND"),
    "::Or": binary("OR"),
    "::Not": unary("NOT"),
    "::Where": elementwise.where,
    # Activations and types.
    "::Relu": activation("RELU"),
    "::Sigmoid": activation("SIGMOID"),
    "::Tanh": activation("TANH"),
    "::Gelu": elementwise.gelu,
    "::Softmax": selection.softmax,
    "::Cast": elementwise.cast,
    "::Identity": elementwise.identity,
    # Shapes.
    "::Reshape": shapes.reshape,
    "::Transpose": shapes.transpose,
    "::Unsqueeze": shapes.unsqueeze,
    "::Squeeze": shapes.squeeze,
    "::Shape": shapes.shape,
    "::Range": shapes.range_,
    "::Concat": shapes.concat,
    "::Expand": shapes.expand,
    "::Split": shapes.split,
    "::Slice": shapes.slice_,
    # Indices and reductions.
    "::Gather": selection.gather,
    "::GatherElements": selection.gather_elements,
    "::ScatterElements": selection.scatter_elements,
    "::TopK": selection.top_k,
    "::ReduceSum": reduction("SUM"),
    "::ReduceMean": reduction("AVG"),
    "::ReduceMax": reduction("MAX"),
    "::ReduceMin": reduction("MIN"),
    "::ReduceL2": selection.reduce_l2,
    # Layers of a transformer.
    "trtllm::Linear": products.linear,
    "trtllm::ScaledLinear": scaled.scaled_linear,
    "::MatMul": products.matmul,
    "::DequantizeLinear": products.dequantize,
    "::RMSNormalization": normalization.rms_norm,
    "::LayerNormalization": normalization.layer_norm,
    "::RotaryEmbedding": attention.rotary,
    "::TensorScatter": attention.update_cache,
    "::Attention": attention.attention,
}
