"""A pass that maps mixtures of experts to a target's operator, which reads the weights of the chosen experts only."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import onnx_ir as ir

from trtllm.checkpoints.recipes import Concat, Recipe, Reshape, Stack, Transpose, UnsignedBlocks
from trtllm.compiler.ir.builder import GraphBuilder, dims, dtype_of
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import Weight, weight_of
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before, replace

MICROSOFT = "com.microsoft"


class LowerMoE(Pass):
    """Replace MoE by the operators MoE and QMoE of com.microsoft.

    MoE(x, r, G, D)                                           becomes  MoE(x, r', G', , D)
    MoE(x, r, DequantizeLinear(G, g), DequantizeLinear(D, d)) becomes  QMoE(x, r', G', g', , D', d)

    r' has one row a token; G' has gate and up rows in turn, as these operators want them. They know SiLU only: a
    mixture with another activation keeps its reference body, which runs every expert on every token.
    """

    name = "lower-moe"

    def run(self, network: Network, context: PassContext) -> int:
        count = 0
        reasons: dict[str, int] = {}
        for node in [node for node in network.graph if is_dialect(node, "MoE")]:
            reason = _why_not(node, context)
            if reason:
                self.miss(context, node, reason)
                reasons[reason] = reasons.get(reason, 0) + 1
                continue
            b = builder_before(network, node)
            lower = _plain if weight_of(node.inputs[2]) else _quantized
            replace(node, [lower(b, node, attributes_of(node))])
            count += 1
        for reason, places in reasons.items():
            context.notes.append(f"experts of {places} layers all run for every token: {reason}")
        return count


def _why_not(node: ir.Node, context: PassContext) -> str:
    """Why the target has no operator for this mixture; empty when it has one."""
    if attributes_of(node)["kind"] != "silu":
        return f"its activation is {attributes_of(node)['kind']}, the operators know silu"
    plain = [weight_of(value) is not None for value in node.inputs[2:4]]
    quantized = [_quantization(value) is not None for value in node.inputs[2:4]]
    if not all(plain) and not all(quantized):
        return "its two weights are of different kinds"
    operator = "MoE" if all(plain) else "QMoE"
    return "" if context.capabilities.has(operator, MICROSOFT) else f"the target lacks {operator}"


def _plain(b: GraphBuilder, node: ir.Node, a: dict[str, Any]) -> ir.Value:
    x, logits, gate_up, down = _inputs(node)
    weight = weight_of(gate_up)
    assert weight is not None
    turned = b.weight(f"{weight.name}_interleaved", interleaved(weight.recipe))
    inputs = [x, _rows(b, logits), turned, None, down]
    return b.op("MoE", inputs, dims(x), dtype_of(x), domain=MICROSOFT, name="moe", **_routing(a), **_SWIGLU)


def _quantized(b: GraphBuilder, node: ir.Node, a: dict[str, Any]) -> ir.Value:
    x, logits, gate_up, down = _inputs(node)
    routes = _rows(b, logits)
    first, second = _quantization(gate_up), _quantization(down)
    assert first is not None and second is not None
    values, scales = first
    operands = [
        _bytes(b, values, interleaved(values.recipe), first),
        b.weight(f"{scales.name}_interleaved", interleaved(scales.recipe)),
        None,
        _bytes(b, second[0], second[0].recipe, second),
        b.weight(second[1].name or "", second[1].recipe),
        *[None] * 7,
        # Without these onnxruntime 1.32 takes other weights than the softmax over all experts when it may not rescale.
        None if a["normalize"] else _softmax(b, routes),
    ]
    while operands[-1] is None:
        operands.pop()
    attributes = {
        "expert_weight_bits": values.recipe.dtype.bits,
        "block_size": _block_size(values, scales),
        "accuracy_level": 4,
        "weights_prepacked": 0,
    }
    inputs = [x, routes, *operands]
    return b.op(
        "QMoE", inputs, dims(x), dtype_of(x), domain=MICROSOFT, name="moe", **_routing(a), **_SWIGLU, **attributes
    )


_SWIGLU = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
"""silu(gate) * up, with the rows of gate and up in turn: the one fused form of the CPU provider."""


def _routing(a: dict[str, Any]) -> dict[str, int]:
    return {"k": int(a["top_k"]), "normalize_routing_weights": int(a["normalize"])}


def _inputs(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    x, logits, gate_up, down = node.inputs
    assert x is not None and logits is not None and gate_up is not None and down is not None
    return x, logits, gate_up, down


def _rows(b: GraphBuilder, logits: ir.Value) -> ir.Value:
    experts = int(dims(logits)[-1])
    return b.op("Reshape", [logits, b.constant([-1, experts])], ("tokens", experts), name="routes")


def _softmax(b: GraphBuilder, routes: ir.Value) -> ir.Value:
    """In float32, whatever the compute type."""
    dtype = dtype_of(routes)
    if dtype == ir.DataType.FLOAT:
        return b.op("Softmax", [routes], axis=-1)
    wide = b.op("Cast", [routes], None, DType.FLOAT32, to=ir.DataType.FLOAT)
    return b.op("Cast", [b.op("Softmax", [wide], axis=-1)], None, dtype, to=dtype)


def _quantization(value: ir.Value | None) -> tuple[Weight, Weight] | None:
    """Values and scales behind DequantizeLinear, None when the value is made otherwise."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 2:
        return None
    values, scales = (weight_of(operand) for operand in node.inputs)
    return None if values is None or scales is None else (values, scales)


def _block_size(values: Weight, scales: Weight) -> int:
    return values.recipe.shape[-1] // scales.recipe.shape[-1]


def _bytes(b: GraphBuilder, values: Weight, recipe: Recipe, pair: tuple[Weight, Weight]) -> ir.Value:
    """[E, N, K * bits / 8]: unsigned integers around 2^(bits-1), the zero point that QMoE assumes."""
    experts, rows, inputs = recipe.shape
    blocks = UnsignedBlocks(recipe, _block_size(*pair))
    packed = Reshape(blocks, (experts, rows, inputs * recipe.dtype.bits // 8))
    return b.weight(f"{values.name}_blocks", packed)


def interleaved(recipe: Recipe) -> Recipe:
    """A recipe [E, 2F, ...] whose rows of each expert are gate 0, up 0, gate 1, ... instead of gates, then ups.

    The rows are turned before anything else happens to them, so that each step still goes expert by expert and, where
    gate and up are separate tensors, row by row.
    """
    if isinstance(recipe, Stack):
        return Stack(tuple(_interleaved_rows(part) for part in recipe.parts))
    operand = getattr(recipe, "of", None)
    if operand is not None and operand.shape[:2] == recipe.shape[:2] and not isinstance(recipe, Reshape | Transpose):
        return changed(recipe, of=interleaved(operand))  # type: ignore[call-arg]
    experts, rows, *rest = recipe.shape
    halves = Reshape(recipe, (experts, 2, rows // 2, *rest))
    turned = Transpose(halves, (0, 2, 1, *range(3, 3 + len(rest))))
    return Reshape(turned, recipe.shape)


def _interleaved_rows(recipe: Recipe) -> Recipe:
    """The same of one expert, [2F, H]."""
    rows, width = recipe.shape
    half = rows // 2
    if isinstance(recipe, Concat) and recipe.axis == 0 and [part.shape[0] for part in recipe.parts] == [half, half]:
        pairs: Recipe = Concat(tuple(Reshape(part, (half, 1, width)) for part in recipe.parts), axis=1)
    else:
        pairs = Transpose(Reshape(recipe, (2, half, width)), (1, 0, 2))
    return Reshape(pairs, recipe.shape)
