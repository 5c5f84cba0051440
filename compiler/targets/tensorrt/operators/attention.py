"""Attention, its cache and rotary embedding, as the library's own layers."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.weights import DTYPES
from trtllm.compiler.targets.tensorrt.emission import Emission
from trtllm.dtypes import DType


def attention(e: Emission, node: ir.Node) -> list[Any]:
    """Attention of query [B, Q, S, D] over key and value [B, G, T, D] under a mask [B, 1, S, T].

    The mask says alone which rows are seen: the library's causal kinds count from a corner, not from a row's length.
    The scale goes to the query, never to the whole cache.
    """
    query, key, value, mask = node.inputs[:4]
    assert query is not None
    is_causal = node.attributes.get_int("is_causal", 0)
    if mask is None or is_causal != 0 or len(node.outputs) > 1:
        raise e.refusal("attention must have a mask, and one result")
    scale = e.number(node.attributes["scale"].value, DTYPES[dtype_of(query)], 4)
    scaled = e.binary(e.of(query), scale, "PROD")
    layer = e.library.add_attention(e.network, scaled, e.of(key), e.of(value), e.of(mask))
    return [e.named(layer).get_output(0)]


def update_cache(e: Emission, node: ir.Node) -> list[Any]:
    """Writes new rows [B, G, S, D] into the cache [B, G, T, D] from row past_lengths[b] on, in place."""
    cache, rows, past_lengths = node.inputs
    assert cache is not None
    if not cache.is_graph_input() or node.attributes.get_int("axis", -2) % 4 != 2:
        raise e.refusal("a cache must be a graph input [batch, heads, length, size]")
    # The documentation allows int64 indices; TensorRT-RTX 1.7 refuses them when it builds.
    indices = e.cast(e.of(past_lengths), DType.INT32)
    return [e.out("add_kv_cache_update", e.of(cache), e.of(rows), indices, e.trt.KVCacheMode.LINEAR)]


def rotary(e: Emission, node: ir.Node) -> list[Any]:
    """Half-split rotation of x [B, S, heads*D], or [B, heads, S, D], by cos and sin [B, S, R/2]."""
    x, cos, sin = node.inputs[:3]
    assert x is not None
    rank, size = len(dims(x)), node.attributes.get_int("rotary_embedding_dim", 0)
    tensor = e.of(x)
    if rank == 3:
        tensor = _split_heads(e, tensor, node.attributes["num_heads"].value, int(dims(x)[-1]))
    interleaved = bool(node.attributes.get_int("interleaved", 0))
    y = e.out("add_rotary_embedding", tensor, e.of(cos), e.of(sin), interleaved, size)
    return [_join_heads(e, y, int(dims(x)[-1])) if rank == 3 else y]


def _split_heads(e: Emission, tensor: Any, heads: int, width: int) -> Any:
    """[B, S, heads*D] as [B, heads, S, D]."""
    layer = e.add("add_shuffle", tensor)
    layer.reshape_dims = (0, 0, heads, width // heads)
    layer.second_transpose = e.trt.Permutation([0, 2, 1, 3])
    return layer.get_output(0)


def _join_heads(e: Emission, tensor: Any, width: int) -> Any:
    """[B, heads, S, D] as [B, S, heads*D]."""
    layer = e.add("add_shuffle", tensor)
    layer.first_transpose = e.trt.Permutation([0, 2, 1, 3])
    layer.reshape_dims = (0, 0, width)
    return layer.get_output(0)
