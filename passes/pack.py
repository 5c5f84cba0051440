"""Passes that join linear layers reading the same input into one wider product."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.checkpoints.recipes import Concat, Recipe
from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import weight_of
from trtllm.passes.base import Pass, PassContext, builder_before, only_user, replace


class PackQkv(Pass):
    """Join the query, key and value projections of an attention layer.

    q = Linear(x, Wq); k = Linear(x, Wk); v = Linear(x, Wv)
        becomes
    q, k, v = Split(Linear(x, Concat(Wq, Wk, Wv)))
    """

    name = "pack-qkv"

    def run(self, network: Network, context: PassContext) -> int:
        count = 0
        for node in list(network.graph):
            if not is_dialect(node, "Attention", "EncoderAttention"):
                continue
            linears = [_projection(value) for value in node.inputs[:3]]
            reason = _why_not(linears)
            if reason:
                self.miss(context, node, reason)
                continue
            _pack(network, [linear for linear in linears if linear is not None], "qkv")
            count += 1
        return count


class PackGateUp(Pass):
    """Join the gate and up projections of a gated MLP.

    y = GatedActivation(Linear(x, Wg), Linear(x, Wu))
        becomes
    y = GatedActivation(Linear(x, Concat(Wg, Wu)))
    """

    name = "pack-gate-up"

    def run(self, network: Network, context: PassContext) -> int:
        count = 0
        for node in list(network.graph):
            if not is_dialect(node, "GatedActivation") or len(node.inputs) != 2:
                continue
            linears = [_linear_of(value) for value in node.inputs]
            reason = _why_not(linears) or _why_uneven(linears)
            if reason:
                self.miss(context, node, reason)
                continue
            packed = _pack(network, [linear for linear in linears if linear is not None], "gate_up")
            split = next(iter(packed.uses())).node
            b = builder_before(network, node)
            y = b.dialect("GatedActivation", [packed], name="packed", kind=node.attributes["kind"].value)
            replace(node, [y])
            network.graph.remove(split, safe=True)
            count += 1
        return count


def _linear_of(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and is_dialect(node, "Linear") else None


def _projection(value: ir.Value | None) -> ir.Node | None:
    """The Linear behind an attention operand, through rotary embedding and head norms."""
    node = value.producer() if value is not None else None
    while node is not None and is_dialect(node, "Rotary", "HeadRMSNorm"):
        operand = node.inputs[0]
        node = operand.producer() if operand is not None else None
    return node if node is not None and is_dialect(node, "Linear") else None


def _why_not(linears: list[ir.Node | None]) -> str:
    """Why these projections cannot be joined; empty when they can."""
    if any(linear is None for linear in linears):
        return "an operand does not come from a linear layer"
    nodes = [linear for linear in linears if linear is not None]
    if len({id(node.inputs[0]) for node in nodes}) != 1:
        return "the projections read different inputs"
    if len({id(node) for node in nodes}) != len(nodes):
        return "the projections are one already"
    if any(weight_of(node.inputs[1]) is None for node in nodes):
        return "a projection's weight is not an initializer (already quantized?)"
    if len({_bias_recipe(node) is None for node in nodes}) != 1:
        return "only some of the projections have a bias"
    if any(only_user(node.outputs[0]) is None for node in nodes):
        return "a projection has other readers"
    return ""


def _why_uneven(linears: list[ir.Node | None]) -> str:
    widths = {dims(linear.outputs[0])[-1] for linear in linears if linear is not None}
    return "gate and up have different widths" if len(widths) != 1 else ""


def _bias_recipe(linear: ir.Node) -> Recipe | None:
    weight = weight_of(linear.inputs[2]) if len(linear.inputs) > 2 else None
    return weight.recipe if weight is not None else None


def _pack(network: Network, linears: list[ir.Node], label: str) -> ir.Value:
    """Replaces linears by one and a Split; returns the packed value."""
    b = builder_before(network, _earliest(network, linears))
    b.scope = ""
    stem = _packed_name(linears, label)
    recipes = [weight_of(linear.inputs[1]).recipe for linear in linears]  # type: ignore[union-attr]
    inputs = [linears[0].inputs[0], b.weight(f"{stem}.weight", Concat(tuple(recipes), axis=0))]
    biases = [_bias_recipe(linear) for linear in linears]
    if all(bias is not None for bias in biases):
        inputs.append(b.weight(f"{stem}.bias", Concat(tuple(bias for bias in biases if bias is not None), axis=0)))
    packed = b.dialect("Linear", inputs, name=stem)
    sizes = [dims(linear.outputs[0])[-1] for linear in linears]
    parts = b.dialect("Split", [packed], name=f"{stem}.split", sizes=sizes)
    for linear, part in zip(linears, parts, strict=True):
        replace(linear, [part])
    return packed


def _earliest(network: Network, nodes: list[ir.Node]) -> ir.Node:
    wanted = {id(node) for node in nodes}
    return next(node for node in network.graph if id(node) in wanted)


def _packed_name(linears: list[ir.Node], label: str) -> str:
    """model.layers.0.self_attn.q_proj, ... as model.layers.0.self_attn.qkv_proj."""
    stems = [(linear.name or "linear").rpartition(".") for linear in linears]
    return f"{stems[0][0]}.{label}_proj" if stems[0][0] else f"{label}_proj"
