"""Products in small formats: quantization and dequantization around a matrix product, which the library makes one."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.dialect import attributes_of
from trtllm.compiler.ir.weights import DTYPES
from trtllm.compiler.targets.tensorrt.emission import Emission
from trtllm.dtypes import DType

SMALL_BLOCK = 16
"""Activations that share a scale of e2m1."""
_FORMATS = {"e4m3": "FP8", "int8": "INT8", "e2m1": "FP4"}


def scaled_linear(e: Emission, node: ir.Node) -> list[Any]:
    """trtllm.ScaledLinear whose activations keep their type, are rounded by one scale, or by blocks of e2m1."""
    a = attributes_of(node)
    given: list[ir.Value | None] = [*node.inputs, *[None] * (6 - len(node.inputs))]
    x, values, scales, factor, activation_scale, bias = given
    assert x is not None and values is not None and scales is not None
    compute = DTYPES[dtype_of(x)]
    around = DType.FLOAT32 if e.library.quantizes_float32 else compute
    operations = e.trt.MatrixOperation
    left = _activations(e, e.of(x), activation_scale, around, a)
    if dtype_of(values) == ir.DataType.FLOAT:
        right = _rounded_weight(e, values, scales, a, len(dims(x)))
    else:
        right = _weight(e, values, scales, factor, around, a, (a["outputs"], int(dims(x)[-1])))
        right = right if len(dims(x)) == 2 else e.expanded(right, list(range(len(dims(x)) - 2)))
    y = e.cast(e.out("add_matrix_multiply", left, operations.NONE, right, operations.TRANSPOSE), compute)
    return [y if bias is None else e.binary(y, e.of(bias, len(dims(x))), "SUM")]


def _activations(e: Emission, x: Any, scale: ir.Value | None, compute: DType, a: dict[str, Any]) -> Any:
    if a["rounding"] == "none":
        return x
    given = e.stored(scale, "FLOAT", ())
    if a["rounding"] == "tensor":
        x = e.cast(x, compute)
        return e.dequantized(e.quantized(x, given, _FORMATS[a["element"]]), given, compute)
    if (a["element"], a["rounding"]) != ("e2m1", "block"):
        raise e.refusal(f"activations of {a['element']} cannot be rounded by {a['rounding']}")
    wanted, small = e.library.data_type(compute), getattr(e.trt.DataType, _FORMATS[a["element"]])
    layer = e.add("add_dynamic_quantize", x, len(x.shape) - 1, SMALL_BLOCK, small, e.trt.DataType.FP8)
    layer.set_input(1, given)
    scales = e.out("add_dequantize", layer.get_output(1), given, wanted)
    return e.out("add_dequantize", layer.get_output(0), scales, wanted)


def _rounded_weight(e: Emission, values: ir.Value, scales: ir.Value, a: dict[str, Any], rank: int) -> Any:
    """A weight [N, K] of float32 that the library rounds while it builds, at the rank of what it multiplies.

    Nothing stands between it and the product, which would hide from the library that this is one of int8.
    """
    axis = rank - 2 if a["rows"] else -1
    given = e.stored(scales, "FLOAT", (a["outputs"],) if a["rows"] else ())
    rounded = e.quantized(e.of(values, rank), given, "INT8", axis=axis)
    return e.dequantized(rounded, given, DType.FLOAT32, axis=axis)


def _weight(
    e: Emission, values: ir.Value, scales: ir.Value, factor: ir.Value | None, compute: DType, a: dict[str, Any],
    shape: tuple[int, int],
) -> Any:  # fmt: skip
    """The dequantized weight [N, K]: one scale, one for each row, or one for each block of a row."""
    wanted = e.library.data_type(compute)
    integers = e.stored(values, _FORMATS[a["element"]], shape)
    if a["scale_element"] == "float32":
        if a["columns"] or a["rows"] > 1:
            raise e.refusal("weights must have one scale, or one for each output")
        layer = e.add("add_dequantize", integers, e.stored(scales, "FLOAT", (shape[0],) if a["rows"] else ()), wanted)
        if a["rows"]:
            layer.axis = 0
        return layer.get_output(0)
    blocks = (shape[0], shape[1] // a["columns"])
    if a["scale_element"] == "e8m0":
        return e.out("add_dequantize", integers, e.stored(scales, "E8M0", blocks), wanted)
    wide = e.out("add_dequantize", e.stored(scales, "FP8", blocks), e.stored(factor, "FLOAT", ()), wanted)
    return e.out("add_dequantize", integers, wide, wanted)
