"""Norms over the last axis, in float32 inside."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.weights import DTYPES
from trtllm.compiler.targets.tensorrt.emission import Emission
from trtllm.dtypes import DType

F32 = DType.FLOAT32


def rms_norm(e: Emission, node: ir.Node) -> list[Any]:
    """x / sqrt(mean(x^2) + epsilon), back in x's type, times the weight. The library has no layer of it."""
    x = node.inputs[0]
    assert x is not None
    rank = len(dims(x))
    wide = e.cast(e.of(x), F32)
    mean = e.reduced(e.binary(wide, wide, "PROD"), "AVG", [rank - 1], keeps=True)
    epsilon = e.number(node.attributes.get_float("epsilon", 1e-5), F32, rank)
    root = e.unary(e.binary(mean, epsilon, "SUM"), "SQRT")
    normed = e.cast(e.binary(wide, root, "DIV"), DTYPES[dtype_of(x)])
    return [e.binary(normed, e.of(node.inputs[1], rank), "PROD")]


def layer_norm(e: Emission, node: ir.Node) -> list[Any]:
    x = node.inputs[0]
    assert x is not None
    rank = len(dims(x))
    scale = e.cast(e.of(node.inputs[1], rank), F32)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    if not hasattr(e.network, "add_normalization_v2"):
        normed = _spelled_layer_norm(e, e.cast(e.of(x), F32), rank, epsilon, scale)
        shifted = normed if bias is None else e.binary(normed, e.cast(e.of(bias, rank), F32), "SUM")
        return [e.cast(shifted, DTYPES[dtype_of(x)])]
    shift = e.cast(e.of(bias, rank), F32) if bias is not None else e.binary(scale, e.number(0.0, F32, rank), "PROD")
    layer = e.add("add_normalization_v2", e.cast(e.of(x), F32), scale, shift, 1 << (rank - 1))
    layer.epsilon = epsilon
    return [e.cast(layer.get_output(0), DTYPES[dtype_of(x)])]


def _spelled_layer_norm(e: Emission, x: Any, rank: int, epsilon: float, scale: Any) -> Any:
    """(x - mean) / sqrt(variance + epsilon) * scale of float32 x."""
    centred = e.binary(x, e.reduced(x, "AVG", [rank - 1], keeps=True), "SUB")
    variance = e.reduced(e.binary(centred, centred, "PROD"), "AVG", [rank - 1], keeps=True)
    root = e.unary(e.binary(variance, e.number(epsilon, F32, rank), "SUM"), "SQRT")
    return e.binary(e.binary(centred, root, "DIV"), scale, "PROD")
