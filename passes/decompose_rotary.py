"""A pass that spells rotary embedding out for targets without an operator of it."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.ir.builder import GraphBuilder, dims
from trtllm.compiler.ir.network import Network
from trtllm.passes.base import Pass, PassContext, builder_before, replace


class DecomposeRotary(Pass):
    """Replace the half-split rotation of heads by products with its tables.

    y = RotaryEmbedding(x, cos, sin)
        becomes
    a, b, rest = Split(heads of x);  y = Concat(a cos - b sin, b cos + a sin, rest)
    """

    name = "decompose-rotary"

    def run(self, network: Network, context: PassContext) -> int:
        table = context.capabilities
        if not table.lists_every_operator or table.has("RotaryEmbedding"):
            return 0
        nodes = [node for node in network.graph if not node.domain and node.op_type == "RotaryEmbedding"]
        for node in nodes:
            replace(node, [_rotated(builder_before(network, node), node)])
        return len(nodes)


def _rotated(b: GraphBuilder, node: ir.Node) -> ir.Value:
    x, cos, sin = node.inputs[:3]
    assert x is not None and cos is not None and sin is not None
    batch, sequence, width = dims(x)
    heads, half = int(node.attributes["num_heads"].value), int(dims(cos)[-1])
    size = int(width) // heads
    split = b.op("Reshape", [x, b.constant([0, 0, heads, size])], (batch, sequence, heads, size))
    sizes = [half, half, *([size - 2 * half] if size > 2 * half else [])]
    parts = b.multi(
        "Split", [split, b.constant(sizes)], [((batch, sequence, heads, extent), None) for extent in sizes], axis=-1
    )
    column, row = (b.op("Unsqueeze", [table, b.constant([2])], (batch, sequence, 1, half)) for table in (cos, sin))
    first = b.op("Sub", [b.op("Mul", [parts[0], column]), b.op("Mul", [parts[1], row])])
    second = b.op("Add", [b.op("Mul", [parts[1], column]), b.op("Mul", [parts[0], row])])
    joined = b.op("Concat", [first, second, *parts[2:]], (batch, sequence, heads, size), axis=-1)
    return b.op("Reshape", [joined, b.constant([0, 0, int(width)])], (batch, sequence, width))
