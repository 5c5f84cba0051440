"""A pass that spells attention out for targets whose attention operator is missing or takes no softcap."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.ir.builder import GraphBuilder, dims, dtype_of
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import DTYPES
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before, replace

F32 = DType.FLOAT32
HIDDEN_SCORE = -1e30
"""Takes the place of a masked score; its exponential is zero in float32."""


class DecomposeAttention(Pass):
    """Replace standard Attention by products and a softmax in float32.

    y = Attention<scale, softcap>(q, k, v, mask)
        becomes
    s = MatMul(q * scale, k'); s = tanh(s / softcap) * softcap; y = MatMul(Softmax(Where(mask, s, -1e30)), v)

    Query heads that share a key head stay a group of their own axis, so that the cache is read as it lies.
    """

    name = "decompose-attention"

    def run(self, network: Network, context: PassContext) -> int:
        count = 0
        for node in list(network.graph):
            if node.domain or node.op_type != "Attention":
                continue
            capped = node.attributes.get_float("softcap", 0.0) > 0.0
            if context.capabilities.has("Attention") and (context.capabilities.supports_softcap or not capped):
                continue
            replace(node, [_decompose(builder_before(network, node), node)])
            count += 1
        return count


def _decompose(b: GraphBuilder, node: ir.Node) -> ir.Value:
    query, key, value, mask = node.inputs[:4]
    assert query is not None and key is not None and value is not None and mask is not None
    batch, heads, sequence, head_size = dims(query)
    groups, capacity, value_size = dims(key)[1], dims(key)[2], dims(value)[3]
    assert isinstance(heads, int) and isinstance(groups, int)
    repeats = heads // groups

    scaled = b.op("Mul", [query, b.constant(node.attributes.get_float("scale", 1.0), DTYPES[dtype_of(query)])])
    split = b.constant([0, groups, repeats, -1, int(head_size)])
    grouped = b.op("Reshape", [scaled, split], (batch, groups, repeats, sequence, head_size))
    keys = b.op("Transpose", [key], (batch, groups, head_size, capacity), perm=[0, 1, 3, 2])
    keys = b.op("Unsqueeze", [keys, b.constant([2])], (batch, groups, 1, head_size, capacity))
    scores = b.op("MatMul", [grouped, keys], (batch, groups, repeats, sequence, capacity))
    weights = _probabilities(b, scores, mask, node.attributes.get_float("softcap", 0.0))
    values = b.op("Unsqueeze", [value, b.constant([2])], (batch, groups, 1, capacity, value_size))
    mixed = b.op("MatMul", [weights, values], (batch, groups, repeats, sequence, value_size))
    joined = b.constant([0, heads, -1, int(value_size)])
    return b.op("Reshape", [mixed, joined], (batch, heads, sequence, value_size))


def _probabilities(b: GraphBuilder, scores: ir.Value, mask: ir.Value, softcap: float) -> ir.Value:
    """Softmax of scores [B, G, R, S, T] where mask [B, 1, S, T] holds, in float32 inside."""
    dtype = dtype_of(scores)
    if dtype != ir.DataType.FLOAT:
        scores = b.op("Cast", [scores], None, F32, to=ir.DataType.FLOAT)
    if softcap > 0.0:
        cap = b.constant(softcap, F32)
        scores = b.op("Mul", [b.op("Tanh", [b.op("Div", [scores, cap])]), cap])
    batch, one, sequence, capacity = dims(mask)
    visible = b.op("Unsqueeze", [mask, b.constant([1])], (batch, 1, one, sequence, capacity))
    kept = b.op("Where", [visible, scores, b.constant(HIDDEN_SCORE, F32)], dims(scores), F32)
    weights = b.op("Softmax", [kept], axis=-1)
    return weights if dtype == ir.DataType.FLOAT else b.op("Cast", [weights], None, dtype, to=dtype)
