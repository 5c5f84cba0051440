"""A pass that stores linear weights as block-wise integers, dequantized in the graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import onnx_ir as ir

from trtllm.checkpoints.recipes import (
    TILE_BLOCK,
    AsymmetricMinima,
    AsymmetricScales,
    AsymmetricValues,
    Cast,
    Concat,
    QuantizedScales,
    QuantizedValues,
    Recipe,
    Slice,
    Source,
    Stack,
)
from trtllm.checkpoints.stored import Offset
from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import DTYPES, IR_TYPES, Weight, weight_of
from trtllm.config import BuildConfig
from trtllm.dtypes import DType
from trtllm.errors import UnsupportedModelError
from trtllm.passes.base import CalibratedWeight, Pass, PassContext, builder_before, replace
from trtllm.quantization import SCHEMES, MixedPrecision, ScaledFormat, Scheme

CPU_PRODUCT = ("QuantizedLinear", "trtllm.cpu")
_WEIGHT_INPUTS = {"Linear": (1,), "LogitsHead": (1,), "MoE": (2, 3)}


@dataclass(frozen=True)
class Treatment:
    """What becomes of one weight."""

    bits: int
    block_size: int
    search: bool = False
    """Whether scales are searched."""
    counted: bool = False
    """Whether blocks have minima."""
    calibrated: Mapping[str, CalibratedWeight] | None = None
    """The integers and scales that calibration has chosen, by the tensor's name; None where it has not."""


class QuantizeWeights(Pass):
    """Quantize the weights of linear layers, experts and the head by the build's scheme.

    y = Linear(x, W)
        becomes
    y = Linear(x, DequantizeLinear(QuantizedValues(W), QuantizedScales(W)))                     or, with minima,
    y = Linear(x, DequantizeBlocks(AsymmetricValues(W), AsymmetricScales(W), AsymmetricMinima(W)))

    A packed weight whose parts are treated differently becomes several products:

    y = Linear(x, Concat(Q, K, V))     becomes     y = Concat(Linear(x, Concat(Q, K)), Linear(x, V))

    Scales have 16 bits, also where the graph computes in float32. The embedding table becomes float16, and by
    `share-embedding` integers where the target looks these up.
    A weight whose inputs are no multiple of the block stays as it is, and so does the router of a mixture of experts.
    """

    name = "quantize-weights"

    def run(self, network: Network, context: PassContext) -> int:
        if context.build.quantization is None:
            return 0
        refuse_zero_point(network, context.build, context.capabilities)
        count = _rescale(network, context)
        for node in list(network.graph):
            if not is_dialect(node, *_WEIGHT_INPUTS):
                continue
            if _is_router(node):
                self.miss(context, node, "it routes tokens to experts, where a rounded weight may choose another one")
                continue
            for piece in _pieces(network, node, context):
                count += self._quantize_node(network, piece, context)
        for node in list(network.graph):
            if is_dialect(node, "Embedding"):
                count += halve_embedding(network, node)
        return count

    def _quantize_node(self, network: Network, node: ir.Node, context: PassContext) -> int:
        weights = [weight_of(node.inputs[index]) for index in _WEIGHT_INPUTS[node.op_type]]
        treatments = [_treatment(network, node, weight, context) for weight in weights]
        reason = _why_not(weights, treatments)
        if reason:
            self._keep(node, weights, reason, context)
            return 0
        for index, treatment in zip(_WEIGHT_INPUTS[node.op_type], treatments, strict=True):
            assert treatment is not None
            _quantize(network, node, index, treatment)
        return len(weights)

    def _keep(self, node: ir.Node, weights: list[Weight | None], reason: str, context: PassContext) -> None:
        self.miss(context, node, reason)
        names = ", ".join(weight.name or "" for weight in weights if weight is not None)
        if names:
            context.notes.append(f"{names} stays unquantized: {reason}")


def _is_router(node: ir.Node) -> bool:
    return any(is_dialect(use.node, "MoE") and use.idx == 1 for use in node.outputs[0].uses())


def _rescale(network: Network, context: PassContext) -> int:
    """Puts the norms that took up channel scales in the place of those published."""
    count = 0
    for name, recipe in context.rescaled.items():
        value = network.graph.initializers.get(name)
        weight = weight_of(value)
        if value is None or weight is None:
            continue
        value.const_value = Weight(name, _in_type(recipe, DTYPES[weight.dtype]))
        count += 1
    return count


def module_bits(build: BuildConfig, module: str, *, is_head: bool) -> int | None:
    """Bits of a module's weights under a build's scheme and its exceptions; None for full precision."""
    assert build.quantization is not None
    plan = build.layer_plan
    if plan.excludes(module):
        return None
    override = plan.override(module)
    scheme = SCHEMES[override or build.quantization]
    if isinstance(scheme, ScaledFormat):
        return scheme.head_bits if is_head and override is None else None
    if isinstance(scheme, MixedPrecision):
        return scheme.head_bits if is_head and build.quantization_bits is not None else None
    return scheme.head_bits if is_head and override is None else scheme.bits


def module_name(weight: str) -> str:
    """`model.layers.0.mlp.up_proj` of `model.layers.0.mlp.up_proj.weight`."""
    return weight.removesuffix(".weight")


def why_no_minima(network: Network, compute: DType, block_size: int, capabilities: Capabilities) -> str:
    """Why the target has no product by 4-bit blocks with minima; empty when it has one."""
    if not capabilities.has(*CPU_PRODUCT):
        return f"target {capabilities.target} has no product by integers with minima"
    if network.info.kind != "decoder" or compute is not DType.FLOAT32 or block_size != TILE_BLOCK:
        return f"integers with minima have a product only in decoders in float32, by blocks of {TILE_BLOCK}"
    return ""


def refuse_zero_point(network: Network, build: BuildConfig, capabilities: Capabilities) -> None:
    """Raises UnsupportedModelError when the build itself asks for minima that its products cannot take."""
    if not build.has_zero_point or build.quantization is None:
        return
    compute = _compute_dtype(network)
    block_size = build.group_size or SCHEMES[build.quantization].block_size
    reason = why_no_minima(network, compute, block_size, capabilities)
    if reason:
        raise UnsupportedModelError(f"has_zero_point: {reason}", "leave it out: 4-bit blocks then have scales alone")


def takes_minima(build: BuildConfig, scheme: Scheme, network: Network, compute: DType, caps: Capabilities) -> bool:
    """Whether 4-bit blocks of a scheme have minima in this build."""
    wanted = build.has_zero_point if build.has_zero_point is not None else getattr(scheme, "has_zero_point", False)
    return wanted and not why_no_minima(network, compute, build.group_size or scheme.block_size, caps)


def _compute_dtype(network: Network) -> DType:
    """The type that the linears' weights have in the graph."""
    for node in network.graph:
        weight = weight_of(node.inputs[1]) if is_dialect(node, "Linear", "LogitsHead") else None
        if weight is not None:
            return DTYPES[weight.dtype]
    return DType.FLOAT32


def _treatment(network: Network, node: ir.Node, weight: Weight | None, context: PassContext) -> Treatment | None:
    """Of a weight whose parts are treated alike; None for full precision."""
    if weight is None:
        return None
    parts = _parts(without_casts(weight.recipe))
    return _part_treatment(network, node, parts[0], context)


def _part_treatment(network: Network, node: ir.Node, part: Recipe, context: PassContext) -> Treatment | None:
    build, is_head = context.build, node.op_type == "LogitsHead"
    sources = part.sources()
    module = (node.name or "") if is_head or not sources else module_name(sources[0])
    bits = module_bits(build, module, is_head=is_head)
    chosen = context.calibrated.get(part.name) if isinstance(part, Source) and not is_head else None
    if chosen is not None:
        bits = chosen.values.dtype.bits
    if bits is None:
        return None
    assert build.quantization is not None
    scheme = SCHEMES[build.layer_plan.override(module) or build.quantization]
    search = bits == 4 and (build.weight_scales or scheme.weight_scales) == "search"
    block_size = build.group_size or scheme.block_size
    if chosen is not None:
        return Treatment(bits, block_size, search, chosen.minima is not None, context.calibrated)
    weight = weight_of(node.inputs[1])
    compute = DTYPES[weight.dtype] if weight is not None else DType.FLOAT32
    counted = (
        bits == 4 and node.op_type != "MoE" and takes_minima(build, scheme, network, compute, context.capabilities)
    )
    return Treatment(bits, block_size, search, counted)


def _parts(recipe: Recipe) -> tuple[Recipe, ...]:
    return recipe.parts if isinstance(recipe, Concat) and recipe.axis == 0 else (recipe,)


def _pieces(network: Network, node: ir.Node, context: PassContext) -> list[ir.Node]:
    """The node, or the products by runs of parts of its weight that are treated alike."""
    weight = weight_of(node.inputs[1]) if node.op_type == "Linear" else None
    if weight is None or not isinstance(weight.recipe, Cast | Concat):
        return [node]
    parts = _parts(without_casts(weight.recipe))

    def kind(part: Recipe) -> tuple[int, bool, bool]:
        treatment = _part_treatment(network, node, part, context)
        if treatment is None:
            return 0, False, False
        return treatment.bits, treatment.counted, treatment.calibrated is not None

    runs = [tuple(run) for _, run in groupby(parts, key=kind)]
    if len(runs) == 1:
        return [node]
    b = builder_before(network, node)
    b.scope = ""
    compute, bias, row = DTYPES[weight.dtype], weight_of(node.inputs[2]) if len(node.inputs) > 2 else None, 0
    pieces, results = [], []
    for index, run in enumerate(runs):
        recipe = run[0] if len(run) == 1 else Concat(run, 0)
        rows = recipe.shape[0]
        inputs = [node.inputs[0], b.weight(f"{weight.name}_{index}", _in_type(recipe, compute))]
        if bias is not None:
            inputs.append(b.weight(f"{bias.name}_{index}", Slice(bias.recipe, 0, row, row + rows)))
        results.append(b.dialect("Linear", inputs, name=f"{node.name}.{index}"))
        pieces.append(b.created[-1])
        row += rows
    joined = b.op("Concat", results, dims(node.outputs[0]), name=f"{node.name}.joined", axis=-1)
    replace(node, [joined])
    return pieces


def _in_type(recipe: Recipe, compute: DType) -> Recipe:
    return recipe if recipe.dtype is compute else Cast(recipe, compute)


def _why_not(weights: list[Weight | None], treatments: list[Treatment | None]) -> str:
    """Why a node keeps its weights; empty when all of them can be quantized. Experts are quantized whole or not."""
    if any(weight is None for weight in weights):
        return "its weight is not an initializer"
    for weight, treatment in zip(weights, treatments, strict=True):
        if treatment is None:
            return "the build keeps it in full precision"
        inputs = weight.recipe.shape[-1]  # type: ignore[union-attr]
        if inputs % treatment.block_size:
            return f"{inputs} inputs are no multiple of the block of {treatment.block_size}"
    return ""


def _quantize(network: Network, node: ir.Node, index: int, treatment: Treatment) -> None:
    weight = weight_of(node.inputs[index])
    assert weight is not None
    block_size = treatment.block_size
    compute = DTYPES[weight.dtype]
    integers, rounded, minima = _quantized_recipes(weight, treatment, compute)
    stem = f"{node.name}.weight" if node.op_type == "LogitsHead" else weight.name
    b = builder_before(network, node)
    b.scope = ""
    values = b.weight(f"{stem}_values", integers)
    scales = b.weight(f"{stem}_scales", _in_type(rounded, compute))
    shape = dims(node.inputs[index])  # type: ignore[arg-type]
    name = f"{stem}_dequantized"
    if minima is not None:
        offsets, form = b.weight(f"{stem}_offsets", minima), Offset.MINIMUM.value
        inputs = [values, scales, offsets]
        dequantized = b.dialect("DequantizeBlocks", inputs, name=name, block_size=block_size, offset=form)
    else:
        dequantized = b.op(
            "DequantizeLinear", [values, scales], shape, compute, name=name, axis=len(shape) - 1, block_size=block_size
        )
    node.replace_input_with(index, dequantized)


def _quantized_recipes(weight: Weight, treatment: Treatment, compute: DType) -> tuple[Recipe, Recipe, Recipe | None]:
    """Integers, scales and minima of a weight: those that calibration chose, or those of its values."""
    source = without_casts(weight.recipe)
    if treatment.calibrated is None and treatment.counted:
        form = (source, treatment.block_size, treatment.search)
        return AsymmetricValues(*form), AsymmetricScales(*form), AsymmetricMinima(*form)
    if treatment.calibrated is None:
        half = DType.FLOAT16 if compute is DType.FLOAT32 else compute
        details = (source, treatment.bits, treatment.block_size, half, treatment.search)
        return QuantizedValues(*details), QuantizedScales(*details), None
    found = [treatment.calibrated[part.name] for part in _parts(source) if isinstance(part, Source)]
    minima = [item.minima for item in found if item.minima is not None]
    return (
        _joined([item.values for item in found]),
        _joined([item.scales for item in found]),
        _joined(minima) if minima else None,
    )


def _joined(parts: list[Recipe]) -> Recipe:
    return parts[0] if len(parts) == 1 else Concat(tuple(parts), 0)


def without_casts(recipe: Recipe) -> Recipe:
    """The recipe before its conversion to the compute type, so that quantization sees the published values."""
    if isinstance(recipe, Cast) and recipe.to.is_float and recipe.of.dtype.is_float:
        return without_casts(recipe.of)
    if isinstance(recipe, Concat | Stack):
        parts = tuple(without_casts(part) for part in recipe.parts)
        if len({part.dtype for part in parts}) == 1:
            return Concat(parts, recipe.axis) if isinstance(recipe, Concat) else Stack(parts)
    return recipe


def halve_embedding(network: Network, node: ir.Node) -> int:
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
