"""A pass that gives linear layers weights in a small format, and rounds what they multiply."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.recipes import Cast, Concat, Recipe
from trtllm.checkpoints.scaled_recipes import (
    LARGEST,
    BlockScales,
    ChannelScaled,
    Constants,
    PowerScales,
    RoundedBy,
    RowScaled,
    ScaledBy,
)
from trtllm.compiler.ir.builder import GraphBuilder
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import Weight, weight_of
from trtllm.passes.base import ChannelRanges, Pass, PassContext, builder_before, replace
from trtllm.passes.quantize import module_name, without_casts
from trtllm.quantization import SCHEMES, ScaledFormat

WIDE_BLOCK = 128
"""Rows and inputs of a block of e4m3 weights."""


class QuantizeScaled(Pass):
    """Store the weights of linear layers as the build's scheme says, with activations rounded before the product.

    y = Linear(x, W)
        becomes
    y = ScaledLinear(x, RoundedBy(W, scales), scales, factor, activation_scale)

    What calibration measured (`PassContext.ranges`) gives the activations one scale where the scheme wants it; inputs
    that `smooth-activations` has divided are as much smaller.

    The head and the embedding are left to quantize-weights; experts and their router keep their precision.
    """

    name = "quantize-scaled"

    def run(self, network: Network, context: PassContext) -> int:
        count = 0
        for node in [node for node in network.graph if is_dialect(node, "Linear", "MoE")]:
            scheme = scheme_of(node, context)
            if scheme is None:
                continue
            reason = why_not(node, scheme)
            if reason:
                self.miss(context, node, reason)
                names = ", ".join(weight.name or "" for weight in map(weight_of, node.inputs[1:]) if weight is not None)
                context.notes.append(f"{names} stays in full precision: {reason}")
                continue
            _quantize(network, node, scheme, context)
            count += 1
        return count


def scheme_of(node: ir.Node, context: PassContext) -> ScaledFormat | None:
    """The scheme of this kind that a node's weights take; None when they take none."""
    build = context.build
    weight = weight_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if build.quantization is None or not is_dialect(node, "Linear", "MoE") or weight is None:
        return None
    sources = weight.recipe.sources()
    modules = [module_name(source) for source in sources]
    if any(build.layer_plan.excludes(module) for module in modules):
        return None
    overrides = [build.layer_plan.override(module) for module in modules]
    scheme = SCHEMES[next(filter(None, overrides), None) or build.quantization]
    return scheme if isinstance(scheme, ScaledFormat) else None


def why_not(node: ir.Node, scheme: ScaledFormat) -> str:
    """Why a linear layer keeps its precision; empty when the format takes it."""
    if is_dialect(node, "MoE"):
        return "experts have no product in this format"
    if any(is_dialect(use.node, "MoE") and use.idx == 1 for use in node.outputs[0].uses()):
        return "it routes tokens to experts"
    weight = weight_of(node.inputs[1])
    assert weight is not None
    multiple = {"int8": 4, "e2m1": 32 if scheme.activations == "none" else 16}.get(scheme.element, 1)
    inputs = weight.recipe.shape[1]
    return f"{inputs} inputs are no multiple of {multiple}" if inputs % multiple else ""


def ranges_of(node: ir.Node, measured: Mapping[str, ChannelRanges]) -> ChannelRanges | None:
    """Of a node whose weight may be packed of several."""
    weight = weight_of(node.inputs[1])
    found = [measured[name] for name in (weight.recipe.sources() if weight is not None else ()) if name in measured]
    if not found:
        return None
    return ChannelRanges(
        np.maximum.reduce([item.inputs for item in found]), np.maximum.reduce([item.weights for item in found])
    )


def divisors_of(recipe: Recipe) -> np.ndarray | None:
    """float32 [K]: what the inputs of a weight were divided by, as the weight was multiplied; None when they were not.

    Parts of a packed weight read the same inputs.
    """
    if isinstance(recipe, ChannelScaled) and not recipe.divides and isinstance(recipe.by, Constants):
        return recipe.by.values
    if isinstance(recipe, Cast | RowScaled):
        return divisors_of(recipe.of)
    return divisors_of(recipe.parts[0]) if isinstance(recipe, Concat) else None


def _quantize(network: Network, node: ir.Node, scheme: ScaledFormat, context: PassContext) -> None:
    weight = weight_of(node.inputs[1])
    assert weight is not None
    source = without_casts(weight.recipe)
    b = builder_before(network, node)
    b.scope = ""
    stem = weight.name or ""
    values, scales, factor, attributes = _weights(b, stem, source, scheme)
    measured, divisors = ranges_of(node, context.ranges), divisors_of(source)
    inputs = [node.inputs[0], values, scales, factor, _activation_scale(b, stem, scheme, measured, divisors)]
    inputs.append(node.inputs[2] if len(node.inputs) > 2 else None)
    while inputs[-1] is None:
        inputs.pop()
    y = b.dialect(
        "ScaledLinear", inputs, name=f"{node.name}.scaled" if node.name else "", element=scheme.element,
        rounding=scheme.activations, outputs=source.shape[0], **attributes,
    )  # fmt: skip
    replace(node, [y])


def _weights(
    b: GraphBuilder, stem: str, source: Recipe, scheme: ScaledFormat
) -> tuple[ir.Value, ir.Value, ir.Value | None, dict[str, object]]:
    """Values, scales, the factor of all scales, and what the operator's attributes say of them."""
    if scheme.element == "e2m1":
        return _small_weights(b, stem, source, scheme)
    rows, columns = {"tensor": (0, 0), "channel": (1, 0), "block": (WIDE_BLOCK, WIDE_BLOCK)}[scheme.weights]
    scales = BlockScales(source, LARGEST[scheme.element], rows, columns)
    values = RoundedBy(source, scales, scheme.element, rows, columns)
    attributes = {"rows": rows, "columns": columns, "scale_element": "float32"}
    return b.weight(f"{stem}_values", values), b.weight(f"{stem}_scales", scales), None, attributes


def _small_weights(
    b: GraphBuilder, stem: str, source: Recipe, scheme: ScaledFormat
) -> tuple[ir.Value, ir.Value, ir.Value | None, dict[str, object]]:
    factor: Recipe | None = None
    if scheme.activations == "none":
        columns, kind = 32, "e8m0"
        scales: Recipe = PowerScales(BlockScales(source, 1.0, 1, columns), 2)
        wide = ScaledBy(scales, None, "e8m0")
    else:
        columns, kind = 16, "e4m3"
        factor = BlockScales(source, LARGEST["e2m1"] * LARGEST["e4m3"], 0, 0)
        scales = RoundedBy(BlockScales(source, LARGEST["e2m1"], 1, columns), factor, "e4m3", 0, 0)
        wide = ScaledBy(scales, factor, "e4m3")
    values = RoundedBy(source, wide, "e2m1", 1, columns)
    return (
        b.weight(f"{stem}_values", values),
        b.weight(f"{stem}_scales", scales),
        b.weight(f"{stem}_factor", factor) if factor is not None else None,
        {"rows": 1, "columns": columns, "scale_element": kind},
    )


def _activation_scale(
    b: GraphBuilder, stem: str, scheme: ScaledFormat, measured: ChannelRanges | None, divisors: np.ndarray | None
) -> ir.Value | None:
    """The calibrated scale [1] of a tensor's activations, or of the scales of its blocks; 1 without measurement."""
    if scheme.activations != "tensor" and not (scheme.element == "e2m1" and scheme.activations == "block"):
        return None
    largest = LARGEST[scheme.element] * (LARGEST["e4m3"] if scheme.element == "e2m1" else 1)
    scale = 1.0
    if measured is not None:
        inputs = measured.inputs if divisors is None else measured.inputs / divisors
        scale = float(inputs.max()) / largest or 1.0
    return b.weight(f"{stem}_activation_scale", Constants.of(np.array([scale], np.float32)))


def scaled_weight(value: ir.Value | None) -> Weight:
    """The weight behind an input of a ScaledLinear."""
    weight = weight_of(value)
    assert weight is not None
    return weight
