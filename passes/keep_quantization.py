"""A pass that keeps the weights of a quantized checkpoint as its integers, scales and offsets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from trtllm.checkpoints.recipes import (
    Cast,
    Concat,
    KeptOffsets,
    KeptScales,
    KeptValues,
    QuantizedScales,
    QuantizedValues,
    Recipe,
    Source,
    Zeros,
)
from trtllm.checkpoints.stored import BLOCK, Offset, StoredQuantization
from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import DTYPES, Weight, weight_of
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before
from trtllm.passes.quantize import halve_embedding, without_casts
from trtllm.passes.share_embedding import looks_up_tiles, why_not

CPU_PRODUCT = ("QuantizedLinear", "trtllm.cpu")


class KeepQuantization(Pass):
    """Let linear layers, the head and embeddings read what the checkpoint stores, instead of its dequantized weights.

    y = Linear(x, W)
        becomes
    y = Linear(x, DequantizeLinear(KeptValues(W), KeptScales(W)))               or, with minima or zero points,
    y = Linear(x, DequantizeBlocks(KeptValues(W), KeptScales(W), KeptOffsets(W)))

    Integers are kept as they are, in 8 bits where 4 do not hold them; scales become float16. A packed weight takes the
    narrowest form that holds all its parts. What no integers with one scale for each 32 inputs express is rounded to
    8 bits where these are finer than what is stored, and else dequantized. The notes say which of these happened.

    An asked-for quantization starts from the dequantized weights; so does `dequantize`, and leaves them so.
    """

    name = "keep-quantization"

    def run(self, network: Network, context: PassContext) -> int:
        if not context.stored:
            return 0
        asked = context.build.quantization
        if asked is not None or context.build.dequantize:
            methods = ", ".join(sorted({stored.method for stored in context.stored.values()}))
            context.notes.append(f"{methods}: " + (f"quantized anew as {asked}" if asked else "dequantized, as asked"))
            return 0
        fates: Counter[tuple[str, str]] = Counter()
        count = 0
        for node in list(network.graph):
            if is_dialect(node, "Linear", "LogitsHead"):
                count += self._keep_linear(network, node, context, fates)
            elif is_dialect(node, "Embedding"):
                count += _keep_embedding(network, node, context, fates)
            elif is_dialect(node, "MoE"):
                for index in (2, 3):
                    _count_dequantized(
                        weight_of(node.inputs[index]), "experts have no product with stored integers", context, fates
                    )
        for (method, fate), number in fates.items():
            context.notes.append(f"{method}: {number} weight{'s' if number != 1 else ''} {fate}")
        return count

    def _keep_linear(
        self, network: Network, node: ir.Node, context: PassContext, fates: Counter[tuple[str, str]]
    ) -> int:
        weight = weight_of(node.inputs[1])
        if weight is None or not _stored_sources(weight, context):
            return 0
        kept = _kept_weight(without_casts(weight.recipe), context)
        compute = DTYPES[weight.dtype]
        reason = kept if isinstance(kept, str) else _why_not(network, kept, compute, context)
        if reason:
            self.miss(context, node, reason)
            _count_dequantized(weight, reason, context, fates)
            return 0
        assert isinstance(kept, _KeptWeight)
        _rewrite(network, node, weight, kept, compute)
        for fate in kept.fates:
            fates[fate] += 1
        return 1


@dataclass(frozen=True)
class _KeptWeight:
    """The recipes of one weight, and what became of each of its parts: (method, fate)."""

    bits: int
    offset: Offset
    values: Recipe
    scales: Recipe
    offsets: Recipe | None
    fates: tuple[tuple[str, str], ...]


def _stored_sources(weight: Weight, context: PassContext) -> list[StoredQuantization]:
    return [context.stored[name] for name in weight.recipe.sources() if name in context.stored]


def _count_dequantized(
    weight: Weight | None, reason: str, context: PassContext, fates: Counter[tuple[str, str]]
) -> None:
    for stored in _stored_sources(weight, context) if weight is not None else ():
        fates[stored.method, f"dequantized: {reason}"] += 1


def _parts(recipe: Recipe) -> list[Source] | None:
    """The sources whose rows, one after the other, are the weight; None when it is made in another way."""
    if type(recipe) is Source:
        return [recipe]
    if isinstance(recipe, Concat) and recipe.axis == 0:
        found = [_parts(part) for part in recipe.parts]
        return None if any(part is None for part in found) else [item for part in found for item in part or ()]
    return None


def _kept_weight(recipe: Recipe, context: PassContext) -> _KeptWeight | str:
    """The recipes in the narrowest form that holds every part, or why there is none."""
    sources = _parts(recipe)
    if sources is None or any(source.name not in context.stored for source in sources):
        return "its rows are not those of quantized tensors"
    stored = [context.stored[source.name] for source in sources]
    if any(item.integers is None and not item.coarse for item in stored):
        return "no integers express it"
    if sources[0].shape[-1] % BLOCK:
        return f"{sources[0].shape[-1]} inputs are no multiple of {BLOCK}"
    forms = [item.integers for item in stored]
    offsets = {form.offset for form in forms if form is not None} - {Offset.NONE}
    if len(offsets) > 1:
        return "some of its parts have minima and some zero points"
    offset = next(iter(offsets), Offset.NONE)
    bits = max(8 if form is None else form.bits for form in forms)
    parts = [_part_recipes(source, item, bits, offset) for source, item in zip(sources, stored, strict=True)]
    return _KeptWeight(
        bits,
        offset,
        _joined([part[0] for part in parts]),
        _joined([part[1] for part in parts]),
        _joined([part[2] for part in parts]) if offset is not Offset.NONE else None,
        tuple((item.method, _fate(item, bits)) for item in stored),
    )


def _part_recipes(
    source: Source, stored: StoredQuantization, bits: int, offset: Offset
) -> tuple[Recipe, Recipe, Recipe]:
    """Values, scales and offsets of one source."""
    if stored.integers is None:
        scales = QuantizedScales(source, 8, BLOCK, DType.FLOAT16)
        return QuantizedValues(source, 8, BLOCK, DType.FLOAT16), scales, Zeros(scales.shape)
    return (
        KeptValues(source, bits, offset.value),
        KeptScales(source, BLOCK),
        KeptOffsets(source, bits, offset.value, BLOCK),
    )


def _joined(parts: Sequence[Recipe]) -> Recipe:
    return parts[0] if len(parts) == 1 else Concat(tuple(parts), 0)


def _fate(stored: StoredQuantization, bits: int) -> str:
    form = stored.integers
    if form is None:
        return "rounded to 8 bits in blocks of 32 (error at most 1/254 of a block's largest)"
    width = f" in {bits} bits" if form.bits != bits else ""
    if form.is_exact:
        return f"kept{width} bit for bit"
    if form.scale_dtype is DType.BFLOAT16:
        return f"kept{width}, scales as float16 (exact from 2^-17 on)"
    return f"kept{width}, scales rounded to float16 (relative error at most 2^-11)"


def _why_not(network: Network, kept: _KeptWeight, compute: DType, context: PassContext) -> str:
    """Why the target cannot multiply by what would be kept; empty when it can."""
    if not context.capabilities.packed_int4:
        return f"target {context.capabilities.target} has no product with stored integers"
    has_offsets = kept.offset is not Offset.NONE
    has_kernel = context.capabilities.has(*CPU_PRODUCT) and network.info.kind == "decoder" and compute is DType.FLOAT32
    if has_offsets and not has_kernel:
        return "integers with offsets have a product only in a decoder that computes in float32"
    return ""


def _rewrite(network: Network, node: ir.Node, weight: Weight, kept: _KeptWeight, compute: DType) -> None:
    stem = f"{node.name}.weight" if node.op_type == "LogitsHead" else weight.name
    b = builder_before(network, node)
    b.scope = ""
    values = b.weight(f"{stem}_values", kept.values)
    scales = b.weight(f"{stem}_scales", kept.scales if compute is DType.FLOAT16 else Cast(kept.scales, compute))
    name = f"{stem}_dequantized"
    if kept.offsets is None:
        shape = dims(node.inputs[1])  # type: ignore[arg-type]
        dequantized = b.op(
            "DequantizeLinear", [values, scales], shape, compute, name=name, axis=len(shape) - 1, block_size=BLOCK
        )
    else:
        offsets = b.weight(f"{stem}_offsets", kept.offsets)
        dequantized = b.dialect(
            "DequantizeBlocks", [values, scales, offsets], name=name, block_size=BLOCK, offset=kept.offset.value
        )
    node.replace_input_with(1, dequantized)


def _keep_embedding(network: Network, node: ir.Node, context: PassContext, fates: Counter[tuple[str, str]]) -> int:
    """Rows of integers and of their scales are looked up and dequantized; what has offsets is looked up in float16.

    Where the target looks rows up in tiles, `share-embedding` puts integers for the float16 table, with offsets too.

    y = Embedding(ids, W)
        becomes
    y = DequantizeLinear(Embedding(ids, KeptValues(W)), Cast(Embedding(ids, KeptScales(W))))
    """
    weight = weight_of(node.inputs[1])
    if weight is None or not _stored_sources(weight, context):
        return 0
    source = without_casts(weight.recipe)
    stored = context.stored.get(source.name) if type(source) is Source else None
    if DTYPES[weight.dtype] is not DType.FLOAT32 or stored is None or not isinstance(source, Source):
        _count_dequantized(weight, "looked up by rows", context, fates)
        return 0
    form = stored.integers
    if looks_up_tiles(network, context) and not why_not(node, source, context):
        fates[stored.method, f"looked up by rows: {_fate(stored, form.bits if form is not None else 8)}"] += 1
        return halve_embedding(network, node)
    if form is None or form.offset is not Offset.NONE or source.shape[-1] % BLOCK:
        fates[stored.method, "looked up by rows: dequantized to float16"] += 1
        return halve_embedding(network, node)
    fates[stored.method, f"looked up by rows: {_fate(stored, 8)}"] += 1
    ids, scale = node.inputs[0], attributes_of(node)["scale"]
    b = builder_before(network, node)
    b.scope = f"{node.name}/"
    rows = b.dialect("Embedding", [ids, b.weight(f"{weight.name}_rows", KeptValues(source, 8, Offset.NONE.value))])
    halves = b.dialect("Embedding", [ids, b.weight(f"{weight.name}_row_scales", KeptScales(source, BLOCK))])
    scales = b.op("Cast", [halves], None, DType.FLOAT32, to=ir.DataType.FLOAT)
    shape = dims(node.outputs[0])
    y = b.op("DequantizeLinear", [rows, scales], shape, DType.FLOAT32, axis=len(shape) - 1, block_size=BLOCK)
    if scale != 1.0:
        y = b.op("Mul", [y, b.constant(scale, DType.FLOAT32)])
    node.outputs[0].replace_all_uses_with(y)
    network.graph.remove(node, safe=True)
    return 1
