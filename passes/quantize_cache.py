"""A pass that stores keys and values in 8 bits an element."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.dialect import attributes_of
from trtllm.compiler.ir.network import Network
from trtllm.errors import UnsupportedModelError
from trtllm.passes.base import Pass, PassContext, builder_before, replace
from trtllm.passes.lower_cached_attention import CPU


@dataclass(frozen=True)
class CacheFormat:
    """How the kernel stores a head's key or value; see runtime/native/attention.h."""

    operator: str
    scale_bytes: int
    """Of the scale that follows each row's elements."""


FORMATS = {"INT8": CacheFormat("PagedAttentionInt8", 2), "FP8": CacheFormat("PagedAttentionFloat8", 0)}
"""By the build's kv_cache_quant_algo."""


class QuantizeCache(Pass):
    """Let the kernel keep its cache in the format that the build asks for.

    y, K', V' = PagedAttention(qkv, K, V, ...)             K float [blocks, G, block size, D]
        becomes
    y, K', V' = PagedAttentionInt8(qkv, K, V, ...)         K uint8 [blocks, G, block size, D + 2]
    y, K', V' = PagedAttentionFloat8(qkv, K, V, ...)       K uint8 [blocks, G, block size, D]

    An int8 row ends with its float16 scale; e4m3 has the scale 1. Raises UnsupportedModelError when an attention is
    not in the paged form.
    """

    name = "quantize-cache"

    def run(self, network: Network, context: PassContext) -> int:
        algorithm = context.build.kv_cache_quant_algo
        if algorithm is None or not network.info.cache:
            return 0
        nodes = [node for node in network.graph if node.domain == CPU and node.op_type == "PagedAttention"]
        if len(nodes) < len(network.info.cache):
            raise UnsupportedModelError(
                f"the cache of this build cannot be {algorithm}: its attention is not the paged kernel's",
                "use float32 at -O2, or leave --kv-cache-dtype out; --why pack-tokens says what is in the way",
            )
        for node in nodes:
            _store_as(network, node, FORMATS[algorithm])
        return len(nodes)


def _store_as(network: Network, node: ir.Node, form: CacheFormat) -> None:
    head_size = attributes_of(node)["head_size"]
    for value in node.inputs[1:3]:
        assert value is not None
        value.shape = ir.Shape([*dims(value)[:-1], head_size + form.scale_bytes])
        value.type = ir.TensorType(ir.DataType.UINT8)
    output, *caches = node.outputs
    results = builder_before(network, node).multi(
        form.operator,
        node.inputs,
        [(dims(output), output.dtype), *((dims(value), ir.DataType.UINT8) for value in node.inputs[1:3] if value)],
        domain=CPU,
        name="paged",
        **{name: attribute.value for name, attribute in node.attributes.items()},
    )
    for old, new in zip(caches, results[1:], strict=True):
        new.name = old.name
    replace(node, results)
