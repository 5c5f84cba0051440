"""Matrix products, and weights that are dequantized on their way into one."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.weights import DTYPES
from trtllm.compiler.targets.tensorrt.emission import Emission
from trtllm.compiler.targets.tensorrt.operators.shapes import is_matrix_transpose


def linear(e: Emission, node: ir.Node) -> list[Any]:
    """x [..., K] by the transpose of weight [N, K], plus bias: the weight stays as it is stored."""
    x, weight = node.inputs[:2]
    assert x is not None
    rank = len(dims(x))
    y = _product(e, e.of(x), e.of(weight, rank), transposed=True)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return [y if bias is None else e.binary(y, e.of(bias, rank), "SUM")]


def matmul(e: Emission, node: ir.Node) -> list[Any]:
    left, right = node.inputs
    assert left is not None and right is not None
    rank = max(len(dims(left)), len(dims(right)))
    swap = right.producer()
    if swap is not None and is_matrix_transpose(swap):
        return [_product(e, e.of(left, rank), e.of(swap.inputs[0], rank), transposed=True)]
    return [_product(e, e.of(left, rank), e.of(right, rank), transposed=False)]


def _product(e: Emission, left: Any, right: Any, *, transposed: bool) -> Any:
    operations = e.trt.MatrixOperation
    turn = operations.TRANSPOSE if transposed else operations.NONE
    return e.out("add_matrix_multiply", left, operations.NONE, right, turn)


def dequantize(e: Emission, node: ir.Node) -> list[Any]:
    """Symmetric blocks along the last axis; the layer reads the block from the shape of the scales."""
    values, scales = node.inputs[:2]
    assert values is not None and scales is not None
    axis = node.attributes.get_int("axis", 1)
    if len(node.inputs) > 2 or axis % len(dims(values)) != len(dims(values)) - 1:
        raise e.refusal("blocks must be symmetric and lie along the last axis")
    dtype = e.library.data_type(DTYPES[dtype_of(node.outputs[0])])
    return [e.out("add_dequantize", e.of(values), e.of(scales), dtype)]
