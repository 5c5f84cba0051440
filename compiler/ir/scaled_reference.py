"""What ScaledLinear computes, in standard ONNX operators: decoded weights, rounded activations, one product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from trtllm.compiler.ir.builder import GraphBuilder, dims, dtype_of
from trtllm.dtypes import DType

F32 = DType.FLOAT32
TOKEN_BLOCK = 128
"""Activations that share an e4m3 scale."""
SMALL_BLOCK = 16
"""Activations that share an e2m1 scale."""
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def scaled_linear(b: GraphBuilder, x: list[ir.Value], a: Mapping[str, Any]) -> list[ir.Value]:
    """x [..., K] by the transpose of decoded weights [N, K], plus bias."""
    data, values, scales, *rest = x  # optional inputs that are absent leave no gap
    compute = dtype_of(data)
    if compute != ir.DataType.FLOAT:  # scales and rounding are float32 whatever the graph computes in
        data = _cast(b, data, F32, ir.DataType.FLOAT)
    factor = rest.pop(0) if a["scale_element"] == "e4m3" else None
    is_given = a["rounding"] == "tensor" or (a["element"], a["rounding"]) == ("e2m1", "block")
    activation_scale = rest.pop(0) if is_given else None
    bias = rest.pop(0) if rest else None
    outputs, features = a["outputs"], int(dims(data)[-1])
    spread = _spread(b, scales, factor, outputs, features, a)
    if dtype_of(values) == ir.DataType.FLOAT:
        weight = _nearest(b, values, spread, a["element"])
    else:
        weight = b.op("Mul", [_decoded(b, values, a), spread])
    turned = b.op("Transpose", [weight], (features, outputs), perm=[1, 0])
    rounded = _rounded(b, data, activation_scale, features, a)
    y = b.op("MatMul", [rounded, turned], (*dims(data)[:-1], outputs))
    if compute != ir.DataType.FLOAT:
        y = b.op("Cast", [y], dims(y), compute, to=compute)
    return [y if bias is None else b.op("Add", [y, bias])]


def _cast(b: GraphBuilder, value: ir.Value, to: DType, data_type: ir.DataType) -> ir.Value:
    return b.op("Cast", [value], dims(value), to, to=data_type)


def _decoded(b: GraphBuilder, values: ir.Value, a: Mapping[str, Any]) -> ir.Value:
    if a["element"] != "e2m1":
        return _cast(b, values, F32, ir.DataType.FLOAT)
    rows, pairs = dims(values)
    low = b.op("BitwiseAnd", [values, b.constant(15, DType.UINT8)])
    high = b.op("BitShift", [values, b.constant(4, DType.UINT8)], direction="RIGHT")
    parts = [b.op("Unsqueeze", [part, b.constant([2])], (rows, pairs, 1), DType.UINT8) for part in (low, high)]
    both = b.op("Concat", parts, (rows, pairs, 2), DType.UINT8, axis=2)
    codes = b.op("Reshape", [both, b.constant([int(rows), 2 * int(pairs)])], (rows, 2 * int(pairs)), DType.UINT8)
    table = b.constant(np.concatenate([_E2M1, -_E2M1]))
    return b.op("Gather", [table, _cast(b, codes, DType.INT32, ir.DataType.INT32)], dims(codes), F32, axis=0)


def _spread(
    b: GraphBuilder, scales: ir.Value, factor: ir.Value | None, outputs: int, features: int, a: Mapping[str, Any]
) -> ir.Value:
    """Scales of blocks as those of every element [N, K]."""
    wide = scales
    if a["scale_element"] == "e8m0":
        powers = b.op("Sub", [_cast(b, scales, F32, ir.DataType.FLOAT), b.constant(127.0, F32)])
        wide = b.op("Pow", [b.constant(2.0, F32), powers], dims(scales), F32)
    elif a["scale_element"] == "e4m3":
        wide = _cast(b, scales, F32, ir.DataType.FLOAT)
    if factor is not None:
        wide = b.op("Mul", [wide, factor])
    rows = np.arange(outputs) // (a["rows"] or outputs)
    columns = np.arange(features) // (a["columns"] or features)
    wide = b.op("Gather", [wide, b.constant(rows)], (outputs, dims(scales)[1]), axis=0)
    return b.op("Gather", [wide, b.constant(columns)], (outputs, features), axis=1)


def _rounded(
    b: GraphBuilder, x: ir.Value, scale: ir.Value | None, features: int, a: Mapping[str, Any]
) -> ir.Value:  # fmt: skip
    """Activations as the nearest values of the format times their scales."""
    if a["rounding"] == "none":
        return x
    if a["rounding"] == "tensor":
        assert scale is not None
        return _nearest(b, x, scale, a["element"])
    if a["rounding"] == "token":
        return _nearest(b, x, _largest(b, x, {"int8": 127.0, "e4m3": 448.0}[a["element"]]), a["element"])
    size = SMALL_BLOCK if a["element"] == "e2m1" else TOKEN_BLOCK
    padding = -features % size
    lead = dims(x)[:-1]
    if padding:
        ends = b.constant([0] * len(lead) + [0] + [0] * len(lead) + [padding])
        x = b.op("Pad", [x, ends], (*lead, features + padding))
    shape = b.constant([0] * len(lead) + [-1, size])
    blocks = b.op("Reshape", [x, shape], (*lead, (features + padding) // size, size))
    rounded = _nearest(b, blocks, _block_scale(b, blocks, scale, a["element"]), a["element"])
    flat = b.op("Reshape", [rounded, b.constant([0] * len(lead) + [-1])], (*lead, features + padding))
    if not padding:
        return flat
    cut = [b.constant([0]), b.constant([features]), b.constant([-1])]
    return b.op("Slice", [flat, *cut], (*lead, features))


def _block_scale(b: GraphBuilder, blocks: ir.Value, factor: ir.Value | None, element: str) -> ir.Value:
    if element != "e2m1":
        return _largest(b, blocks, 448.0)
    assert factor is not None
    wanted = b.op("Div", [_largest(b, blocks, 6.0), factor])
    return b.op("Mul", [_as_e4m3(b, wanted), factor])


def _largest(b: GraphBuilder, x: ir.Value, divisor: float) -> ir.Value:
    size = b.op("Abs", [x])
    most = b.op("ReduceMax", [size, b.constant([-1])], (*dims(x)[:-1], 1), keepdims=1)
    return b.op("Div", [most, b.constant(divisor, F32)])


def _nearest(b: GraphBuilder, x: ir.Value, scale: ir.Value, element: str) -> ir.Value:
    """x as the nearest multiple of its scale that the format has; 0 where the scale is."""
    positive = b.op("Greater", [scale, b.constant(0.0, F32)], dims(scale), DType.BOOL)
    divisor = b.op("Where", [positive, scale, b.constant(1.0, F32)], dims(scale), F32)
    quotient = b.op("Div", [x, divisor])
    if element == "int8":
        quotient = b.op("Clip", [quotient, b.constant(-128.0, F32), b.constant(127.0, F32)])
        return b.op("Mul", [b.op("Round", [quotient]), scale])
    return b.op("Mul", [_as_e4m3(b, quotient) if element == "e4m3" else _as_e2m1(b, quotient), scale])


def _as_e4m3(b: GraphBuilder, x: ir.Value) -> ir.Value:
    clipped = b.op("Clip", [x, b.constant(-448.0, F32), b.constant(448.0, F32)])
    small = b.op("Cast", [clipped], dims(x), DType.FLOAT8_E4M3, to=ir.DataType.FLOAT8E4M3FN, saturate=1)
    return _cast(b, small, F32, ir.DataType.FLOAT)


def _as_e2m1(b: GraphBuilder, x: ir.Value) -> ir.Value:
    """Steps of 0.5 below 2, of 1 below 4, of 2 above: each rounded to even."""
    clipped = b.op("Clip", [x, b.constant(-6.0, F32), b.constant(6.0, F32)])
    size = b.op("Abs", [clipped])
    results = clipped
    for step, limit in ((2.0, None), (1.0, 4.0), (0.5, 2.0)):
        scaled = b.op("Round", [b.op("Div", [clipped, b.constant(step, F32)])])
        value = b.op("Mul", [scaled, b.constant(step, F32)])
        if limit is None:
            results = value
            continue
        below = b.op("Less", [size, b.constant(limit, F32)], dims(size), DType.BOOL)
        results = b.op("Where", [below, value, results], dims(size), F32)
    return results
