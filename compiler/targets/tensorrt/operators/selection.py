"""Operators that pick or place elements by index, and reductions."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.weights import DTYPES
from trtllm.compiler.targets.tensorrt.emission import Emission
from trtllm.compiler.targets.tensorrt.operators.elementwise import Emit
from trtllm.compiler.targets.tensorrt.operators.shapes import constant_integers


def _axis(node: ir.Node, default: int) -> int:
    data = node.inputs[0]
    assert data is not None
    return node.attributes.get_int("axis", default) % len(dims(data))


def gather(e: Emission, node: ir.Node) -> list[Any]:
    return [e.out("add_gather", e.of(node.inputs[0]), e.of(node.inputs[1]), _axis(node, 0))]


def gather_elements(e: Emission, node: ir.Node) -> list[Any]:
    layer = e.add("add_gather_v2", e.of(node.inputs[0]), e.of(node.inputs[1]), e.trt.GatherMode.ELEMENT)
    layer.axis = _axis(node, 0)
    return [layer.get_output(0)]


def scatter_elements(e: Emission, node: ir.Node) -> list[Any]:
    layer = e.add("add_scatter", *(e.of(value) for value in node.inputs), e.trt.ScatterMode.ELEMENT)
    layer.axis = _axis(node, 0)
    return [layer.get_output(0)]


def top_k(e: Emission, node: ir.Node) -> list[Any]:
    (count,) = constant_integers(e, node.inputs[1])
    operation = e.trt.TopKOperation.MAX if node.attributes.get_int("largest", 1) else e.trt.TopKOperation.MIN
    layer = e.add("add_topk", e.of(node.inputs[0]), operation, count, 1 << _axis(node, -1))
    indices = e.cast(layer.get_output(1), DTYPES[dtype_of(node.outputs[1])])
    return [layer.get_output(0), indices]


def softmax(e: Emission, node: ir.Node) -> list[Any]:
    layer = e.add("add_softmax", e.of(node.inputs[0]))
    layer.axes = 1 << _axis(node, -1)
    return [layer.get_output(0)]


def _reduced_axes(e: Emission, node: ir.Node) -> list[int]:
    data = node.inputs[0]
    assert data is not None
    rank = len(dims(data))
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return list(range(rank))
    return [axis % rank for axis in constant_integers(e, node.inputs[1])]


def reduction(operation: str) -> Emit:
    def emit(e: Emission, node: ir.Node) -> list[Any]:
        keeps = bool(node.attributes.get_int("keepdims", 1))
        return [e.reduced(e.of(node.inputs[0]), operation, _reduced_axes(e, node), keeps=keeps)]

    return emit


def reduce_l2(e: Emission, node: ir.Node) -> list[Any]:
    """The square root of the sum of squares."""
    tensor = e.of(node.inputs[0])
    keeps = bool(node.attributes.get_int("keepdims", 1))
    total = e.reduced(e.binary(tensor, tensor, "PROD"), "SUM", _reduced_axes(e, node), keeps=keeps)
    return [e.unary(total, "SQRT")]
