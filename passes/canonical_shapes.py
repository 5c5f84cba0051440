"""A pass that reads every extent from where it is first known, so that masks and counters of all layers become one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtllm.compiler.ir.builder import Dim, dims
from trtllm.compiler.ir.network import Network
from trtllm.passes.base import Pass, PassContext, builder_before, replace


class CanonicalShapes(Pass):
    """Replace shapes of values inside the graph by constants or by shapes of graph inputs.

    s = Shape<start=1, end=2>(hidden)   [B, "sequence", H]     becomes     s = Shape<start=1, end=2>(input_ids)
    t = Shape<start=2, end=3>(cache)    [B, G, 1024, D]        becomes     t = 1024
    """

    name = "canonical-shapes"

    def run(self, network: Network, context: PassContext) -> int:
        homes = _homes(network.graph)
        count = 0
        for node in list(network.graph):
            if node.domain or node.op_type != "Shape" or node.inputs[0] is None or node.inputs[0].shape is None:
                continue
            extents = _extents(node)
            if all(isinstance(extent, int) for extent in extents):
                b = builder_before(network, node)
                replace(node, [b.constant(np.asarray(extents, np.int64))])
            elif len(extents) == 1 and extents[0] in homes:
                count += _move(node, homes[extents[0]])
                continue
            else:
                self.miss(context, node, "it mixes extents, or one that no graph input has")
                continue
            count += 1
        return count


def _homes(graph: ir.Graph) -> dict[Dim, tuple[ir.Value, int]]:
    """The first graph input and axis that has each symbolic extent."""
    homes: dict[Dim, tuple[ir.Value, int]] = {}
    for value in graph.inputs:
        for axis, extent in enumerate(dims(value)):
            if isinstance(extent, str):
                homes.setdefault(extent, (value, axis))
    return homes


def _extents(node: ir.Node) -> tuple[Dim, ...]:
    value = node.inputs[0]
    assert value is not None
    start, end = (node.attributes[name].value if name in node.attributes else None for name in ("start", "end"))
    return dims(value)[slice(start, end)]


def _move(node: ir.Node, home: tuple[ir.Value, int]) -> int:
    value, axis = home
    if node.inputs[0] is value and node.attributes.get_int("start", 0) == axis:
        return 0
    node.replace_input_with(0, value)
    node.attributes["start"] = ir.AttrInt64("start", axis)
    node.attributes["end"] = ir.AttrInt64("end", axis + 1)
    return 1
