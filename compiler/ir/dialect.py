"""The operators of the `trtllm` domain: each described once (arity, attributes, shape rule, meaning).

Builders, verifier, targets and tests read this table. What each operator computes is given in standard ONNX
operators by `trtllm.compiler.ir.reference`.

Shapes use B batch, S new tokens of this step (padded to the longest row), T cache capacity, H hidden, N/K out/in
features, V vocabulary, Q/G query and key-value heads, D head size, R rotary size, E experts, F expert width.

A graph that `trtllm.passes.pack_tokens` has packed has B = 1 and the new tokens of all rows side by side in S; its
Positions, SelectTokens and Attention have become inputs, and operators of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from trtllm.errors import GraphError, nearest

DOMAIN = "trtllm"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "tanh")
REQUIRED = object()

Results = list[tuple[list[Any], ir.DataType]]


@dataclass(frozen=True)
class Operator:
    """One dialect operator."""

    name: str
    inputs: tuple[str, ...]
    """Input names in order; a trailing '?' marks an optional one."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    """Name -> default, or REQUIRED."""
    shape_rule: Callable[[ir.Node, Mapping[str, Any]], Results]
    doc: str

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes with defaults filled in. Raises GraphError for unknown or missing ones."""
        for key in given:
            if key not in self.attributes:
                raise GraphError(f"operator {self.name} has no attribute {nearest(key, self.attributes)}")
        missing = [k for k, default in self.attributes.items() if default is REQUIRED and k not in given]
        if missing:
            raise GraphError(f"operator {self.name} needs attribute {', '.join(missing)}")
        return {key: given.get(key, default) for key, default in self.attributes.items()}

    def output_count(self, attributes: Mapping[str, Any]) -> int:
        return len(self.outputs)

    @property
    def arity(self) -> tuple[int, int]:
        """Fewest and most inputs."""
        return sum(not name.endswith("?") for name in self.inputs), len(self.inputs)


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """A node's attributes as Python values; for a dialect node, with defaults filled in."""
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    operator = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
    return operator.complete(given) if operator else given


def infer(node: ir.Node) -> None:
    """Sets shape and type of a dialect node's outputs from its inputs."""
    operator = OPERATORS[node.op_type]
    results = operator.shape_rule(node, attributes_of(node))
    for value, (shape, dtype) in zip(node.outputs, results, strict=True):
        value.shape = ir.Shape(shape)
        value.type = ir.TensorType(dtype)


def is_dialect(node: ir.Node, *op_types: str) -> bool:
    """Whether the node is a dialect operator, of one of `op_types` when given."""
    return node.domain == DOMAIN and (not op_types or node.op_type in op_types)


def _shape(node: ir.Node, index: int) -> list[Any]:
    value = node.inputs[index]
    if value is None or value.shape is None:
        raise GraphError(f"input {index} of {node.op_type} '{node.name}' has no shape")
    return list(value.shape)


def _type(node: ir.Node, index: int) -> ir.DataType:
    value = node.inputs[index]
    if value is None or value.dtype is None:
        raise GraphError(f"input {index} of {node.op_type} '{node.name}' has no type")
    return value.dtype


def _same(node: ir.Node, _: Mapping[str, Any]) -> Results:
    return [(_shape(node, 0), _type(node, 0))]


def _embedding(node: ir.Node, _: Mapping[str, Any]) -> Results:
    return [([*_shape(node, 0), _shape(node, 1)[1]], _type(node, 1))]


def _linear(node: ir.Node, _: Mapping[str, Any]) -> Results:
    x, weight = _shape(node, 0), _shape(node, 1)
    if isinstance(x[-1], int) and x[-1] != weight[1]:
        raise GraphError(f"{node.op_type} '{node.name}': input has {x[-1]} features, weight takes {weight[1]}")
    return [([*x[:-1], weight[0]], _type(node, 0))]


def _scaled_linear(node: ir.Node, attributes: Mapping[str, Any]) -> Results:
    return [([*_shape(node, 0)[:-1], attributes["outputs"]], _type(node, 0))]


def _head(node: ir.Node, attributes: Mapping[str, Any]) -> Results:
    return [(_linear(node, attributes)[0][0], ir.DataType.FLOAT)]


def _add_norm(node: ir.Node, _: Mapping[str, Any]) -> Results:
    return [(_shape(node, 0), _type(node, 0))] * 2


def _positions(node: ir.Node, _: Mapping[str, Any]) -> Results:
    return [(_shape(node, 0), ir.DataType.INT64)]


def _attention(node: ir.Node, attributes: Mapping[str, Any]) -> Results:
    batch, sequence, _ = _shape(node, 0)
    width = attributes["num_heads"] * attributes["head_size"]
    cache = (_shape(node, 3), _type(node, 3))
    return [([batch, sequence, width], _type(node, 0)), cache, cache]


def _dequantize(node: ir.Node, _: Mapping[str, Any]) -> Results:
    return [(_shape(node, 0), _type(node, 1))]


def _gated(node: ir.Node, _: Mapping[str, Any]) -> Results:
    shape = _shape(node, 0)
    if len(node.inputs) == 1 or node.inputs[1] is None:
        shape[-1] = shape[-1] // 2
    return [(shape, _type(node, 0))]


def _split(node: ir.Node, attributes: Mapping[str, Any]) -> Results:
    shape = _shape(node, 0)
    return [([*shape[:-1], size], _type(node, 0)) for size in attributes["sizes"]]


def _select(node: ir.Node, _: Mapping[str, Any]) -> Results:
    batch, _, hidden = _shape(node, 0)
    return [([batch, 1, hidden], _type(node, 0))]


def _pool(node: ir.Node, _: Mapping[str, Any]) -> Results:
    batch, _, hidden = _shape(node, 0)
    return [([batch, hidden], ir.DataType.FLOAT)]


class _SplitOperator(Operator):
    def output_count(self, attributes: Mapping[str, Any]) -> int:
        return len(attributes["sizes"])


_LIST = (
    Operator(
        "Embedding", ("ids", "weight"), ("y",), {"scale": 1.0}, _embedding,
        "Rows of weight [V, H] by ids [B, S], times scale.",
    ),
    Operator(
        "Linear", ("x", "weight", "bias?"), ("y",), {}, _linear,
        "x [..., K] times the transpose of weight [N, K], plus bias [N]. The weight may be dequantized in the graph.",
    ),
    Operator(
        "ScaledLinear", ("x", "values", "scales", "factor?", "activation_scale?", "bias?"), ("y",),
        {"element": REQUIRED, "rounding": REQUIRED, "outputs": REQUIRED, "rows": 0, "columns": 0,
         "scale_element": "float32"}, _scaled_linear,
        "Linear with a weight in a small format (element e4m3, int8 or e2m1 in pairs): values [N, K] times the scales"
        " of their blocks of `rows` x `columns` (0: all), times factor; activations are rounded to the same format by"
        " one scale (rounding tensor), by token, by block of a token (128, e2m1 16), or not at all. Values of float32"
        " are those of int8 before their rounding.",
    ),
    Operator(
        "RMSNorm", ("x", "weight"), ("y",), {"epsilon": 1e-6}, _same,
        "x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in float32 inside.",
    ),
    Operator(
        "LayerNorm", ("x", "weight", "bias?"), ("y",), {"epsilon": 1e-5}, _same,
        "(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis.",
    ),
    Operator(
        "AddRMSNorm", ("x", "residual", "weight"), ("y", "sum"), {"epsilon": 1e-6}, _add_norm,
        "sum = x + residual; y = RMSNorm(sum).",
    ),
    Operator(
        "AddLayerNorm", ("x", "residual", "weight", "bias?"), ("y", "sum"), {"epsilon": 1e-5}, _add_norm,
        "sum = x + residual; y = LayerNorm(sum).",
    ),
    Operator(
        "Positions", ("ids", "past_lengths"), ("positions",), {}, _positions,
        "Absolute position of each new token: past_lengths[b] + s, int64 [B, S].",
    ),
    Operator(
        "Rotary", ("x", "cos", "sin"), ("y",), {"num_heads": REQUIRED, "rotary_size": REQUIRED}, _same,
        "Rotary embedding (half-split form) of x [B, S, heads*D] by cos and sin [B, S, R/2]; the rest of D passes.",
    ),
    Operator(
        "HeadRMSNorm", ("x", "weight"), ("y",), {"num_heads": REQUIRED, "epsilon": 1e-6}, _same,
        "RMSNorm over each head of x [B, S, heads*D] with weight [D].",
    ),
    Operator(
        "Attention",
        ("query", "key", "value", "past_key", "past_value", "past_lengths", "lengths"),
        ("y", "present_key", "present_value"),
        {
            "layer": REQUIRED, "num_heads": REQUIRED, "num_kv_heads": REQUIRED, "head_size": REQUIRED,
            "scale": REQUIRED, "window": 0, "softcap": 0.0,
        },
        _attention,
        "Causal attention over a cache that it extends in place. query [B, S, Q*D]; key, value [B, S, G*D] are "
        "written to rows past_lengths[b] + s of the cache [B, G, T, D]; a query at absolute position p sees cache "
        "rows j <= p, and with a window w > 0 only j > p - w. lengths [B] counts the valid new tokens of each row; "
        "rows past it are padding, whose results are unspecified.",
    ),
    Operator(
        "EncoderAttention", ("query", "key", "value", "lengths"), ("y",),
        {"num_heads": REQUIRED, "head_size": REQUIRED, "scale": REQUIRED}, _same,
        "Bidirectional attention over the lengths[b] valid tokens of each row; [B, S, Q*D].",
    ),
    Operator(
        "Activation", ("x",), ("y",), {"kind": REQUIRED}, _same, "The activation `kind`, element-wise.",
    ),
    Operator(
        "GatedActivation", ("gate", "up?"), ("y",), {"kind": REQUIRED}, _gated,
        "activation(gate) * up. With one input [..., 2F] the gate is its first half and up its second.",
    ),
    Operator(
        "MoE", ("x", "router_logits", "gate_up", "down"), ("y",),
        {"top_k": REQUIRED, "normalize": 1, "kind": "silu"}, _same,
        "Mixture of experts: softmax over router_logits [B, S, E], the top_k kept (rescaled to sum 1 when normalize), "
        "each expert a gated MLP with gate_up [E, 2F, H] (gate first) and down [E, H, F].",
    ),
    _SplitOperator(
        "Split", ("x",), ("parts",), {"sizes": REQUIRED}, _split, "Consecutive pieces of the last axis.",
    ),
    Operator(
        "SelectTokens", ("x", "lengths"), ("y",), {}, _select,
        "The last valid token of each row: x[b, lengths[b] - 1], [B, 1, H].",
    ),
    Operator(
        "DequantizeBlocks", ("values", "scales", "offsets"), ("weight",), {"block_size": REQUIRED, "offset": REQUIRED},
        _dequantize,
        "Integers [N, K] with scales and offsets [N, K / block_size]: scale * value + offset when offset is 'minimum', "
        "scale * (value - offset) when it is 'zero_point'. An int4 value v stands for v + 8.",
    ),
    Operator(
        "LogitsHead", ("x", "weight", "bias?"), ("logits",), {"softcap": 0.0, "scale": 1.0}, _head,
        "Linear to the vocabulary in float32, times scale, then softcap * tanh(logits / softcap) when softcap > 0.",
    ),
    Operator(
        "Pool", ("x", "lengths"), ("y",), {"kind": REQUIRED, "normalize": 0}, _pool,
        "One vector a row, float32 [B, H]: kind 'mean' over valid tokens, 'cls' the first, 'last' the last valid; "
        "scaled to length 1 when normalize.",
    ),
)  # fmt: skip

OPERATORS: Mapping[str, Operator] = {operator.name: operator for operator in _LIST}
assert len(OPERATORS) == len(_LIST), "an operator is described twice"
