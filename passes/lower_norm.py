"""A pass that maps fused residual norms to a target's fused operator, where it has one."""

from __future__ import annotations

from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.passes.base import Pass, PassContext, builder_before, replace

_OPERATORS = {"AddRMSNorm": "SkipSimplifiedLayerNormalization", "AddLayerNorm": "SkipLayerNormalization"}


class LowerAddNorm(Pass):
    """Replace AddRMSNorm and AddLayerNorm by the skip-norm operators.

    y, s = AddRMSNorm(x, r, w)     becomes     y, , , s = SkipSimplifiedLayerNormalization(x, r, w)
    """

    name = "lower-add-norm"

    def run(self, network: Network, context: PassContext) -> int:
        count = 0
        for node in list(network.graph):
            if not is_dialect(node, *_OPERATORS):
                continue
            operator = _OPERATORS[node.op_type]
            if not context.capabilities.has(operator, "com.microsoft"):
                continue
            b = builder_before(network, node)
            shape = dims(node.outputs[0])
            y, _, _, total = b.multi(
                operator,
                node.inputs,
                [(shape, None), ((1,), None), ((1,), None), (shape, None)],
                domain="com.microsoft",
                name="norm",
                epsilon=attributes_of(node)["epsilon"],
            )
            for unused in y.producer().outputs[1:3]:  # type: ignore[union-attr]
                unused.name = ""
            replace(node, [y, total])
            count += 1
        return count
