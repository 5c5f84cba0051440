"""A pass that replaces every remaining dialect operator by its body in standard operators."""

from __future__ import annotations

from trtllm.compiler.ir.dialect import DOMAIN, attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.reference import BODIES
from trtllm.passes.base import Pass, PassContext, builder_before, replace


class InlineDialect(Pass):
    """Replace dialect operators that the target lacks by their reference bodies.

    y = trtllm.GatedActivation<kind="silu">(g, u)     becomes     y = Mul(Mul(g, Sigmoid(g)), u)
    """

    name = "inline-dialect"

    def run(self, network: Network, context: PassContext) -> int:
        count = 0
        for node in list(network.graph):
            if not is_dialect(node) or context.capabilities.has(node.op_type, DOMAIN):
                continue
            b = builder_before(network, node)
            inputs = [value for value in node.inputs if value is not None]
            replace(node, BODIES[node.op_type](b, inputs, attributes_of(node)))
            count += 1
        return count
