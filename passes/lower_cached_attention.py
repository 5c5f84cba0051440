"""A pass that maps cached attention to the project's own CPU kernel, with head norms and rotation inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.dialect import attributes_of, is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.passes.base import Pass, PassContext, builder_before, replace
from trtllm.passes.lower_attention import packed_projection, rotary_table

CPU = "trtllm.cpu"


@dataclass(frozen=True, eq=False)
class _Operand:
    """A query or key on its way back to the packed projection."""

    source: ir.Value
    norm: ir.Value | None
    epsilon: float
    tables: tuple[ir.Value, ir.Value] | None
    rotary_size: int


@dataclass(frozen=True, eq=False)
class FusedAttention:
    """An Attention with its norms and rotation, as the kernels take it."""

    packed: ir.Value
    """The projection that query, key and value are split from."""
    optional_inputs: tuple[ir.Value | None, ...]
    """Tables of cosines and sines, norm weights of query and key."""
    attributes: Mapping[str, Any]


class LowerCachedAttention(Pass):
    """Replace Attention by CachedAttention, which reads the packed projection.

    q, k, v = Split(qkv)
    y, K', V' = Attention(Rotary(HeadRMSNorm(q)), Rotary(HeadRMSNorm(k)), v, K, V, past, lengths)
        becomes
    y, K', V' = CachedAttention(qkv, K, V, past, lengths, cos, sin, wq, wk)

    Norms and rotation may be absent. Rotation must go by tables of the position alone, and all in float32.
    """

    name = "lower-cached-attention"

    def run(self, network: Network, context: PassContext) -> int:
        if not context.capabilities.has("CachedAttention", CPU):
            return 0
        count = 0
        for node in list(network.graph):
            if not is_dialect(node, "Attention"):
                continue
            reason = self._lower(network, node)
            if reason:
                self.miss(context, node, reason)
            count += not reason
        return count

    def _lower(self, network: Network, node: ir.Node) -> str:
        """Lowers one node, or says why not."""
        fused = fused_attention(node)
        if isinstance(fused, str):
            return fused
        b = builder_before(network, node)
        results = b.multi(
            "CachedAttention",
            [fused.packed, *node.inputs[3:7], *fused.optional_inputs],
            [(dims(value), value.dtype) for value in node.outputs],
            domain=CPU,
            name="cached",
            **fused.attributes,
        )
        replace(node, results)
        return ""


def fused_attention(node: ir.Node) -> FusedAttention | str:
    """What the kernels need to take an Attention with its norms and rotation, or why they cannot."""
    query, key = (_operand(node.inputs[index]) for index in range(2))
    if query is None or key is None:
        return "its angles depend on more than the position"
    if query.tables != key.tables or query.rotary_size != key.rotary_size or query.epsilon != key.epsilon:
        return "query and key are treated differently"
    packed = packed_projection(query.source, key.source, node.inputs[2])
    if packed is None:
        return "query, key and value are not one Split"
    if packed.dtype != ir.DataType.FLOAT:
        return "it computes in another type than float32"
    a = attributes_of(node)
    attributes = {name: a[name] for name in ("num_heads", "num_kv_heads", "head_size", "window")}
    attributes |= {"rotary_size": query.rotary_size, "norm_epsilon": float(query.epsilon)}
    attributes |= {"scale": float(a["scale"]), "softcap": float(a["softcap"])}
    return FusedAttention(packed, (*(query.tables or (None, None)), query.norm, key.norm), attributes)


def _operand(value: ir.Value | None) -> _Operand | None:
    """What is done to a projection before attention; None when the kernel cannot do it."""
    assert value is not None
    tables, rotary_size, norm, epsilon = None, 0, None, 0.0
    node = value.producer()
    if node is not None and is_dialect(node, "Rotary"):
        cos, sin = (rotary_table(node.inputs[index]) for index in (1, 2))
        if cos is None or sin is None:
            return None
        tables, rotary_size = (cos, sin), attributes_of(node)["rotary_size"]
        value = node.inputs[0]
        assert value is not None
        node = value.producer()
    if node is not None and is_dialect(node, "HeadRMSNorm"):
        norm, epsilon = node.inputs[1], attributes_of(node)["epsilon"]
        value = node.inputs[0]
    assert value is not None
    return _Operand(value, norm, epsilon, tables, rotary_size)
