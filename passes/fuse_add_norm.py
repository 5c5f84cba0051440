"""A pass that computes a residual sum and its norm in one node."""

from __future__ import annotations

from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.passes.base import Pass, PassContext, builder_before, replace

_FUSED = {"RMSNorm": "AddRMSNorm", "LayerNorm": "AddLayerNorm"}


class FuseAddNorm(Pass):
    """Replace an add and its norm by one node that yields both.

    s = Add(x, r)
    y = RMSNorm(s, w)     becomes     y, s = AddRMSNorm(x, r, w)

    The sum stays an output: the next block's residual reads it. LayerNorm likewise.
    """

    name = "fuse-add-norm"

    def run(self, network: Network, context: PassContext) -> int:
        count = 0
        for norm in list(network.graph):
            if not is_dialect(norm, *_FUSED):
                continue
            operand = norm.inputs[0]
            add = operand.producer() if operand is not None else None
            if add is None or add.domain or add.op_type != "Add":
                self.miss(context, norm, "its input is no sum")
                continue
            x, residual = add.inputs
            if x is None or residual is None or x.shape != residual.shape:
                self.miss(context, norm, "the addends have different shapes")
                continue
            if any(user.node is not norm and _comes_before(user.node, norm, network) for user in add.outputs[0].uses()):
                self.miss(context, norm, "the sum is read before the norm")
                continue
            b = builder_before(network, norm)
            b.scope = ""
            y, total = b.dialect(
                _FUSED[norm.op_type], [x, residual, *norm.inputs[1:]], name=norm.name or "", **attributes_of(norm)
            )
            replace(norm, [y])
            replace(add, [total])
            count += 1
        return count


def _comes_before(node: object, other: object, network: Network) -> bool:
    for candidate in network.graph:
        if candidate is node:
            return True
        if candidate is other:
            return False
    return False
