"""A pass that spells out quantized weights as constants of floats, for engines without constants of small integers."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from trtllm.checkpoints.recipes import Cast, Dequantized, QuantizedValues, Recipe
from trtllm.checkpoints.scaled_recipes import RoundedBy
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import DTYPES, Weight, weight_of
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before, replace


class WidenWeights(Pass):
    """Store what blocks of integers stand for, and weights that the engine rounds by itself before they are rounded.

    y = Linear(x, DequantizeLinear(V, S))     becomes     y = Linear(x, Dequantized(V))

    where the target has no dequantization of blocks: the results are those of the scheme, the size is not. And

    y = ScaledLinear(x, RoundedBy(W, S), S)     becomes     y = ScaledLinear(x, W in float32, S)

    where it has no constants of 8 bits: by the same scales it rounds to the same integers.
    """

    name = "widen-weights"

    def run(self, network: Network, context: PassContext) -> int:
        table = context.capabilities
        if not table.lists_every_operator:
            return 0
        fates: Counter[str] = Counter()
        if not table.has("DequantizeLinear"):
            for node in [node for node in network.graph if not node.domain and node.op_type == "DequantizeLinear"]:
                fates.update(_spelled_out(network, node))
        if table.value_dtypes is not None and DType.INT8 not in table.value_dtypes:
            for node in [node for node in network.graph if is_dialect(node, "ScaledLinear")]:
                fates.update(_unrounded(network, node))
        for fate, count in fates.items():
            context.notes.append(f"{count} weight{'s' if count != 1 else ''} {fate}")
        return fates.total()


def _spelled_out(network: Network, node: ir.Node) -> list[str]:
    values = weight_of(node.inputs[0])
    if values is None or not isinstance(values.recipe, QuantizedValues):
        return []
    to = DTYPES[node.outputs[0].dtype or ir.DataType.FLOAT]
    b = builder_before(network, node)
    b.scope = ""
    stem = (values.name or "").removesuffix("_values")
    replace(node, [b.weight(f"{stem}_dequantized", Dequantized(values.recipe, to))])
    bits = values.recipe.bits
    return [f"rounded to {bits} bits and stored as {to.value}: this version has no constants of {bits} bits in blocks"]


def _unrounded(network: Network, node: ir.Node) -> list[str]:
    value, weight = node.inputs[1], weight_of(node.inputs[1])
    if value is None or weight is None or not isinstance(weight.recipe, RoundedBy) or weight.recipe.element != "int8":
        return []
    whole: Recipe = weight.recipe.of
    whole = whole if whole.dtype is DType.FLOAT32 else Cast(whole, DType.FLOAT32)
    value.const_value = Weight(weight.name or "", whole)
    value.type = ir.TensorType(ir.DataType.FLOAT)
    value.shape = ir.Shape(whole.shape)
    return ["stored as float32 and rounded to int8 by the engine: this version has no constants of 8 bits"]
