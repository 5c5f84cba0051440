"""A pass that keeps only the last token of each row before the vocabulary head."""

from __future__ import annotations

from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.passes.base import Pass, PassContext, builder_before


class SelectLastToken(Pass):
    """Compute logits of the last valid token of each row only.

    logits = LogitsHead(x [B, S, H], w)
        becomes
    logits = LogitsHead(SelectTokens(x, lengths) [B, 1, H], w)

    It moves through the final norm, so that only one row a sequence is normalised.
    """

    name = "select-last-token"

    def run(self, network: Network, context: PassContext) -> int:
        if context.build.gather_context_logits:
            return 0
        lengths = next((value for value in network.graph.inputs if value.name == "lengths"), None)
        count = 0
        for head in list(network.graph):
            states = head.inputs[0] if is_dialect(head, "LogitsHead") else None
            if states is None or lengths is None:
                continue
            producer = states.producer()
            if producer is not None and is_dialect(producer, "SelectTokens"):
                continue
            b = builder_before(network, head)
            selected = b.dialect("SelectTokens", [states, lengths], name="last")
            head.replace_input_with(0, selected)
            shape = list(head.outputs[0].shape or ())
            head.outputs[0].shape = type(head.outputs[0].shape)([shape[0], 1, shape[2]])  # type: ignore[misc]
            count += 1
        return count
