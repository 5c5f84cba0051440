"""A pass that moves part of the activations' range into the weights, so that both are rounded with less error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.recipes import Cast, Recipe
from trtllm.checkpoints.scaled_recipes import ChannelScaled, Constants, RowScaled
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import DTYPES, Weight, weight_of
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before, only_user
from trtllm.passes.quantize import without_casts
from trtllm.passes.quantize_scaled import ranges_of, scheme_of, why_not
from trtllm.quantization import ScaledFormat

_NORMS = ("RMSNorm", "LayerNorm")
_LEAST, _MOST = 1e-5, 1e5
"""Bounds of a factor."""


class SmoothActivations(Pass):
    """Divide the inputs of linear layers by a factor for each channel, and multiply the weights that read them by it.

    y = Linear(x, W)      becomes      y = Linear(x / s, W * s)      s = max|x|^a / max|W|^(1 - a) of every channel

    What makes the inputs takes the division up where nothing else reads them:

    x = RMSNorm(h, w)                  x = RMSNorm(h, w / s)         LayerNorm's bias too
    x = GatedActivation(g, Linear(h, U))     U / s by rows, bias too; likewise behind a ReLU
    x = Attention(q, k, Linear(h, V))        V / s by rows, where the query heads of a key-value head share factors

    Elsewhere a product divides its inputs when it runs. Without rounding the results are the same. What is measured
    decides the factors (`PassContext.ranges`): without it, as in a mere plan, nothing changes. Ranges of columns are
    those of the weights as published, before rows of some are divided: any factors are exact.
    """

    name = "smooth-activations"

    def run(self, network: Network, context: PassContext) -> int:
        groups: dict[ir.Value, list[ir.Node]] = {}
        for node in network.graph:
            if _is_smoothed(node, context):
                x = node.inputs[0]
                assert x is not None
                groups.setdefault(x, []).append(node)
        divided = []
        for x, linears in groups.items():
            if not self._smooth(network, x, linears, context):
                divided += [linear.name or "a product" for linear in linears]
        if divided:
            context.notes.append(
                f"{', '.join(divided)} divide{'s' if len(divided) == 1 else ''} activations at run time to smooth them"
            )
        return len(groups)

    def _smooth(self, network: Network, x: ir.Value, linears: list[ir.Node], context: PassContext) -> bool:
        """Smooths what `linears` read; whether the producer of x took the division up."""
        scheme = scheme_of(linears[0], context)
        assert scheme is not None and scheme.smoothing is not None
        found = [ranges for ranges in (ranges_of(linear, context.ranges) for linear in linears) if ranges is not None]
        inputs = np.maximum.reduce([ranges.inputs for ranges in found])
        weights = np.maximum.reduce([ranges.weights for ranges in found])
        norm, rows, reason = _producer(x, linears, context)
        if rows is not None:
            inputs, weights = rows.shared(inputs), rows.shared(weights)
        vector = smoothing_vector(inputs, weights, scheme.smoothing)
        factors = rows.spread(vector) if rows is not None else vector
        if norm is not None:
            for index in range(1, len(norm.inputs)):
                _rescale(network, norm, index, vector, divides=True)
        elif rows is not None:
            _divide_rows(network, rows, vector)
        else:
            self.miss(context, linears[0], reason)
            _divide(network, x, linears, vector)
        for linear in linears:
            _rescale(network, linear, 1, factors)
        return norm is not None or rows is not None


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a linear layer's weight that make activations."""

    linear: ir.Node
    first: int
    heads: int = 1
    """Groups of `size` rows; each is read `repeats` times in a row."""
    size: int = 0
    repeats: int = 1

    def shared(self, channels: np.ndarray) -> np.ndarray:
        """[heads * repeats * size] -> [heads * size]: the largest of the channels that one row makes."""
        return channels.reshape(self.heads, self.repeats, -1).max(axis=1).reshape(-1)

    def spread(self, rows: np.ndarray) -> np.ndarray:
        """[heads * size] -> [heads * repeats * size]."""
        return np.repeat(rows.reshape(self.heads, 1, -1), self.repeats, axis=1).reshape(-1)


def smoothing_vector(inputs: np.ndarray, weights: np.ndarray, share: float) -> np.ndarray:
    """max|x_j|^share / max|w_j|^(1 - share) of every channel j; 1 where either is 0. float32 [K]."""
    both = (inputs > 0) & (weights > 0)
    x, w = np.where(both, inputs, 1).astype(np.float64), np.where(both, weights, 1).astype(np.float64)
    return np.where(both, np.clip(x**share / w ** (1 - share), _LEAST, _MOST), 1).astype(np.float32)


def _is_smoothed(node: ir.Node, context: PassContext) -> bool:
    if not is_dialect(node, "Linear"):
        return False
    scheme = scheme_of(node, context)
    if scheme is None or scheme.smoothing is None or why_not(node, scheme):
        return False
    return ranges_of(node, context.ranges) is not None


def _producer(
    x: ir.Value, linears: list[ir.Node], context: PassContext
) -> tuple[ir.Node | None, _Rows | None, str]:  # fmt: skip
    """The norm or the rows of a linear layer that can make x divided; neither, and why not."""
    node = x.producer()
    if node is None:
        return None, None, "its inputs come from outside"
    others = [use.node for use in x.uses() if use.node not in linears]
    if others or x.is_graph_output():
        name = (others[0].name or others[0].op_type) if others else "the graph's output"
        return None, None, f"{name} reads its inputs too"
    if is_dialect(node, *_NORMS):
        if x is node.outputs[0] and all(weight_of(value) is not None for value in node.inputs[1:]):
            return node, None, ""
        return None, None, f"{node.name} has no weight of its own"
    rows = _rows_behind(node)
    if rows is None:
        return None, None, f"{node.name or node.op_type} does not let a factor pass"
    reason = _why_rows_stay(rows.linear, context)
    return (None, None, reason) if reason else (None, rows, "")


def _rows_behind(node: ir.Node) -> _Rows | None:
    """The rows in which a node's results are linear, or homogeneous; None when there are none, or others read them."""
    if is_dialect(node, "GatedActivation"):
        value = node.inputs[-1]
        assert value is not None and value.shape is not None
        width = value.shape[-1]
        if not isinstance(width, int):
            return None
        packed = len(node.inputs) == 1
        size = width // 2 if packed else width
        return _rows_of(value, size if packed else 0, node, heads=1, size=size)
    if is_dialect(node, "Activation") and attributes_of(node)["kind"] == "relu":
        value = node.inputs[0]
        assert value is not None and value.shape is not None
        width = value.shape[-1]
        return _rows_of(value, 0, node, heads=1, size=width) if isinstance(width, int) else None
    if is_dialect(node, "Attention", "EncoderAttention"):
        a, value = attributes_of(node), node.inputs[2]
        assert value is not None
        heads = a.get("num_kv_heads", a["num_heads"])
        return _rows_of(value, 0, node, heads=heads, size=a["head_size"], repeats=a["num_heads"] // heads)
    return None


def _rows_of(
    value: ir.Value, first: int, reader: ir.Node, *, heads: int, size: int, repeats: int = 1
) -> _Rows | None:  # fmt: skip
    """`heads * size` rows from `first` of the linear layer that makes `value` for `reader` alone, through a Split."""
    node = value.producer()
    if only_user(value) is not reader or node is None:
        return None
    if is_dialect(node, "Split"):
        sizes, packed = attributes_of(node)["sizes"], node.inputs[0]
        assert packed is not None
        first += sum(sizes[: list(node.outputs).index(value)])
        reader, node = node, packed.producer()
        if only_user(packed) is not reader or node is None:
            return None
    if not is_dialect(node, "Linear") or any(weight_of(item) is None for item in node.inputs[1:]):
        return None
    return _Rows(node, first, heads, size, repeats)


def _why_rows_stay(linear: ir.Node, context: PassContext) -> str:
    """Rows of a scale or a block each may take any factor; what calibration has rounded stays as it is."""
    weight = weight_of(linear.inputs[1])
    assert weight is not None
    if any(source in context.calibrated for source in weight.recipe.sources()):
        return f"the rows of {linear.name} are calibrated"
    scheme = scheme_of(linear, context)
    if isinstance(scheme, ScaledFormat) and scheme.weights == "tensor":
        return f"the rows of {linear.name} share a scale"
    return ""


def _divide_rows(network: Network, rows: _Rows, vector: np.ndarray) -> None:
    linear = rows.linear
    for index in range(1, len(linear.inputs)):
        weight = weight_of(linear.inputs[index])
        assert weight is not None
        whole = np.ones(weight.recipe.shape[0], np.float32)
        whole[rows.first : rows.first + len(vector)] = vector
        _rescale(network, linear, index, whole, divides=True, rows=len(weight.recipe.shape) > 1)


def _divide(network: Network, x: ir.Value, linears: list[ir.Node], vector: np.ndarray) -> None:
    """Divides x before the linears that read it."""
    b = builder_before(network, linears[0])
    b.scope = ""
    assert x.dtype is not None
    recipe: Recipe = Constants.of(1 / vector)
    compute = DTYPES[x.dtype]
    stem = linears[0].name or x.name or "product"
    factors = b.weight(f"{stem}.smoother", recipe if compute is DType.FLOAT32 else Cast(recipe, compute))
    divided = b.op("Mul", [x, factors], name=f"{stem}.smoothed")
    for linear in linears:
        linear.replace_input_with(0, divided)


def _rescale(
    network: Network, node: ir.Node, index: int, factors: np.ndarray, *, divides: bool = False, rows: bool = False
) -> None:
    """Multiplies or divides one of a node's weights in its last axis, or in its rows."""
    value = node.inputs[index]
    weight = weight_of(value)
    assert value is not None and weight is not None
    plain, by, compute = without_casts(weight.recipe), Constants.of(factors), DTYPES[weight.dtype]
    wide = plain if plain.dtype is DType.FLOAT32 else Cast(plain, DType.FLOAT32)
    recipe: Recipe = RowScaled(wide, by, divides) if rows else ChannelScaled(wide, by, divides)
    recipe = recipe if compute is DType.FLOAT32 else Cast(recipe, compute)
    if len(list(value.uses())) == 1:
        value.const_value = Weight(weight.name or "", recipe)
        return
    b = builder_before(network, node)
    b.scope = ""
    node.replace_input_with(index, b.weight(f"{weight.name}_smooth", recipe))
