"""A pass that stores linear weights as block-wise integers, dequantized in the graph."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.checkpoints.recipes import Cast, Concat, QuantizedScales, QuantizedValues, Recipe, Stack
from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import DTYPES, IR_TYPES, Weight, weight_of
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before
from trtllm.quantization import SCHEMES, WeightOnly

_WEIGHT_INPUTS = {"Linear": (1,), "LogitsHead": (1,), "MoE": (2, 3)}


class QuantizeWeights(Pass):
    """Quantize the weights of linear layers, experts and the head by the build's weight-only scheme.

    y = Linear(x, W)
        becomes
    y = Linear(x, DequantizeLinear(QuantizedValues(W), QuantizedScales(W)))

    Scales have 16 bits, also where the graph computes in float32. The embedding table keeps its values, in float16.
    A weight whose inputs are no multiple of the block stays as it is, and so does the router of a mixture of experts.
    """

    name = "quantize-weights"

    def run(self, network: Network, context: PassContext) -> int:
        if context.build.quantization is None:
            return 0
        scheme = SCHEMES[context.build.quantization]
        assert isinstance(scheme, WeightOnly), scheme.name
        count = 0
        for node in list(network.graph):
            if not is_dialect(node, *_WEIGHT_INPUTS):
                continue
            if _is_router(node):
                self.miss(context, node, "it routes tokens to experts, where a rounded weight may choose another one")
                continue
            weights = [weight_of(node.inputs[index]) for index in _WEIGHT_INPUTS[node.op_type]]
            reason = _why_not(node, weights, scheme)
            if reason:
                self._keep(node, weights, reason, context)
                continue
            for index in _WEIGHT_INPUTS[node.op_type]:
                _quantize(network, node, index, scheme)
                count += 1
        for node in list(network.graph):
            if is_dialect(node, "Embedding"):
                count += _halve_embedding(network, node)
        return count

    def _keep(self, node: ir.Node, weights: list[Weight | None], reason: str, context: PassContext) -> None:
        self.miss(context, node, reason)
        names = ", ".join(weight.name or "" for weight in weights if weight is not None)
        if names:
            context.notes.append(f"{names} stays unquantized: {reason}")


def _is_router(node: ir.Node) -> bool:
    return any(is_dialect(use.node, "MoE") and use.idx == 1 for use in node.outputs[0].uses())


def _why_not(node: ir.Node, weights: list[Weight | None], scheme: WeightOnly) -> str:
    """Why a node keeps its weights; empty when all of them can be quantized. Experts are quantized whole or not."""
    if any(weight is None for weight in weights):
        return "its weight is not an initializer"
    for weight in weights:
        inputs = weight.recipe.shape[-1]  # type: ignore[union-attr]
        if inputs % scheme.block_size:
            return f"{inputs} inputs are no multiple of the block of {scheme.block_size}"
    return ""


def _quantize(network: Network, node: ir.Node, index: int, scheme: WeightOnly) -> None:
    weight = weight_of(node.inputs[index])
    assert weight is not None
    bits = scheme.head_bits if node.op_type == "LogitsHead" else scheme.bits
    compute = DTYPES[weight.dtype]
    stored = DType.FLOAT16 if compute is DType.FLOAT32 else compute
    source = without_casts(weight.recipe)
    stem = f"{node.name}.weight" if node.op_type == "LogitsHead" else weight.name
    b = builder_before(network, node)
    b.scope = ""
    values = b.weight(f"{stem}_values", QuantizedValues(source, bits, scheme.block_size, stored))
    rounded: Recipe = QuantizedScales(source, bits, scheme.block_size, stored)
    scales = b.weight(f"{stem}_scales", rounded if stored is compute else Cast(rounded, compute))
    shape = dims(node.inputs[index])  # type: ignore[arg-type]
    dequantized = b.op(
        "DequantizeLinear", [values, scales], shape, compute, name=f"{stem}_dequantized",
        axis=len(shape) - 1, block_size=scheme.block_size,
    )  # fmt: skip
    node.replace_input_with(index, dequantized)


def without_casts(recipe: Recipe) -> Recipe:
    """The recipe before its conversion to the compute type, so that quantization sees the published values."""
    if isinstance(recipe, Cast) and recipe.to.is_float and recipe.of.dtype.is_float:
        return without_casts(recipe.of)
    if isinstance(recipe, Concat | Stack):
        parts = tuple(without_casts(part) for part in recipe.parts)
        if len({part.dtype for part in parts}) == 1:
            return Concat(parts, recipe.axis) if isinstance(recipe, Concat) else Stack(parts)
    return recipe


def _halve_embedding(network: Network, node: ir.Node) -> int:
    """Stores the table in float16; its rows become float32 again before anything, a scale included, is done to them."""
    weight = weight_of(node.inputs[1])
    if weight is None or DTYPES[weight.dtype] is not DType.FLOAT32:
        return 0
    b = builder_before(network, node)
    b.scope = ""
    half = b.weight(f"{weight.name}_half", Cast(without_casts(weight.recipe), DType.FLOAT16))
    result = node.outputs[0]
    users = list(result.uses())
    node.replace_input_with(1, half)
    result.type = ir.TensorType(IR_TYPES[DType.FLOAT16])
    anchor = _next_node(network, node)
    after = builder_before(network, anchor)
    after.scope = ""
    wide = after.op("Cast", [result], None, DType.FLOAT32, to=ir.DataType.FLOAT, name=f"{node.name}.wide")
    scale = attributes_of(node)["scale"]
    if scale != 1.0:
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
        wide = after.op("Mul", [wide, after.constant(scale, DType.FLOAT32)], name=f"{node.name}.scaled")
    for use in users:
        use.node.replace_input_with(use.idx, wide)
    return 1


def _next_node(network: Network, node: ir.Node) -> ir.Node:
    nodes = iter(network.graph)
    for candidate in nodes:
        if candidate is node:
            return next(nodes)
    raise AssertionError("an embedding is never the last node")
