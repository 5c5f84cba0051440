"""Arithmetic, comparisons, activations and type conversions."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.weights import DTYPES
from trtllm.compiler.targets.tensorrt.emission import Emission
from trtllm.dtypes import DType

Emit = Callable[[Emission, ir.Node], list[Any]]


def _operands(e: Emission, node: ir.Node) -> list[Any]:
    """The tensors of a node's inputs, all at the rank of the widest."""
    rank = max(len(dims(value)) for value in node.inputs if value is not None)
    return [e.of(value, rank) for value in node.inputs]


def binary(operation: str, *, negated: bool = False) -> Emit:
    """An element-wise operation over two or more inputs, folded from the left."""

    def emit(e: Emission, node: ir.Node) -> list[Any]:
        first, *rest = _operands(e, node)
        for operand in rest:
            first = e.binary(first, operand, operation)
        return [e.unary(first, "NOT") if negated else first]

    return emit


def unary(operation: str) -> Emit:
    def emit(e: Emission, node: ir.Node) -> list[Any]:
        return [e.unary(e.of(node.inputs[0]), operation)]

    return emit


def activation(kind: str) -> Emit:
    def emit(e: Emission, node: ir.Node) -> list[Any]:
        return [e.out("add_activation", e.of(node.inputs[0]), getattr(e.trt.ActivationType, kind))]

    return emit


def gelu(e: Emission, node: ir.Node) -> list[Any]:
    is_tanh = node.attributes.get_string("approximate", "none") == "tanh"
    kind = "GELU_TANH" if is_tanh else "GELU_ERF"
    if hasattr(e.trt.ActivationType, kind):
        return activation(kind)(e, node)
    x = node.inputs[0]
    assert x is not None
    return [_spelled_gelu(e, e.of(x), len(dims(x)), DTYPES[dtype_of(x)], is_tanh=is_tanh)]


def _spelled_gelu(e: Emission, x: Any, rank: int, dtype: DType, *, is_tanh: bool) -> Any:
    """x (1 + erf(x / sqrt(2))) / 2, or with tanh(sqrt(2 / pi) (x + 0.044715 x^3)) for the error function."""

    def scaled(tensor: Any, factor: float) -> Any:
        return e.binary(tensor, e.number(factor, DType.FLOAT32, rank), "PROD")

    wide = e.cast(x, DType.FLOAT32)
    if is_tanh:
        cube = e.binary(e.binary(wide, wide, "PROD"), wide, "PROD")
        inner = scaled(e.binary(wide, scaled(cube, 0.044715), "SUM"), sqrt(2 / pi))
        bent = e.out("add_activation", inner, e.trt.ActivationType.TANH)
    else:
        bent = e.unary(scaled(wide, sqrt(0.5)), "ERF")
    half = scaled(e.binary(bent, e.number(1.0, DType.FLOAT32, rank), "SUM"), 0.5)
    return e.cast(e.binary(wide, half, "PROD"), dtype)


def cast(e: Emission, node: ir.Node) -> list[Any]:
    return [e.cast(e.of(node.inputs[0]), DTYPES[dtype_of(node.outputs[0])])]


def where(e: Emission, node: ir.Node) -> list[Any]:
    return [e.out("add_select", *_operands(e, node))]


def identity(e: Emission, node: ir.Node) -> list[Any]:
    return [e.of(node.inputs[0])]
