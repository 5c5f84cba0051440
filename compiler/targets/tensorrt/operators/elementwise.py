"""Arithmetic, comparisons, activations and type conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.weights import DTYPES
from trtllm.compiler.targets.tensorrt.emission import Emission

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
    kind = "GELU_TANH" if node.attributes.get_string("approximate", "none") == "tanh" else "GELU_ERF"
    return activation(kind)(e, node)


def cast(e: Emission, node: ir.Node) -> list[Any]:
    return [e.cast(e.of(node.inputs[0]), DTYPES[dtype_of(node.outputs[0])])]


def where(e: Emission, node: ir.Node) -> list[Any]:
    return [e.out("add_select", *_operands(e, node))]


def identity(e: Emission, node: ir.Node) -> list[Any]:
    return [e.of(node.inputs[0])]
