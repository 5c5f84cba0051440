"""A pass that maps products in small formats to the CPU kernel."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.checkpoints.scaled_recipes import LaneTiles, RowScales
from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.passes.base import Pass, PassContext, builder_before, replace
from trtllm.passes.lower_linear import CPU, gate_before
from trtllm.passes.quantize_scaled import scaled_weight

_ELEMENTS = {"e4m3": 0, "e2m1": 1, "int8": 2}
_SCALES = {"float32": 0, "e4m3": 1, "e8m0": 2}
_ROUNDINGS = {"none": 0, "tensor": 1, "token": 2, "block": 3}


class LowerScaled(Pass):
    """Replace a product in a small format by the target's own, which reads the weight in tiles.

    y = ScaledLinear(GatedActivation(x), V, S)   becomes   y = trtllm.cpu.ScaledLinear(x, LaneTiles(V), LaneTiles(S))

    It computes in float32; in another type the reference body takes its place.
    """

    name = "lower-scaled"

    def run(self, network: Network, context: PassContext) -> int:
        if not context.capabilities.has("ScaledLinear", CPU):
            return 0
        nodes = [node for node in network.graph if is_dialect(node, "ScaledLinear")]
        nodes = [node for node in nodes if node.inputs[0] and dtype_of(node.inputs[0]) == ir.DataType.FLOAT]
        for node in nodes:
            _lower(network, node)
        return len(nodes)


def _lower(network: Network, node: ir.Node) -> None:
    a = attributes_of(node)
    inputs = [*node.inputs, *[None] * (6 - len(node.inputs))]
    x, values, scales, factor, activation_scale, bias = inputs
    assert x is not None
    outputs, features = a["outputs"], int(dims(x)[-1])
    b = builder_before(network, node)
    stored, grid = scaled_weight(values), scaled_weight(scales)
    is_int8 = a["element"] == "int8"
    tiles = b.weight(f"{stored.name}_lanes", LaneTiles(stored.recipe, 4 if is_int8 else 1, flips=is_int8))
    rows = RowScales(grid.recipe, outputs, a["rows"]) if a["rows"] != 1 else grid.recipe
    lanes = b.weight(f"{grid.name}_lanes", LaneTiles(rows, grid.recipe.dtype.bits // 8))
    gate, operand = gate_before(node, x)
    given = [operand, tiles, lanes, factor, activation_scale, bias]
    while given[-1] is None:
        given.pop()
    y = b.op(
        "ScaledLinear",
        given,
        (*dims(x)[:-1], outputs),
        ir.DataType.FLOAT,
        domain=CPU,
        name="scaled",
        N=outputs,
        K=features,
        block=a["columns"] or features,
        element=_ELEMENTS[a["element"]],
        scale_type=_SCALES[a["scale_element"]],
        rounding=_ROUNDINGS[a["rounding"]],
        gate=gate,
    )
    replace(node, [y])
