"""Makes nodes: the one door through which model builders, reference bodies and passes add operators to a graph.

It knows the operators' shapes through `trtllm.compiler.ir.dialect` and the handful of standard operators below;
it knows no model and no target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.recipes import Recipe
from trtllm.compiler.ir.dialect import DOMAIN, OPERATORS, infer
from trtllm.compiler.ir.weights import IR_TYPES, Weight
from trtllm.dtypes import DType

OPSET = 24
Dim = int | str


class GraphBuilder:
    """Appends nodes to a graph, in order, with typed results.

    `scope` prefixes the names of nodes and constants, so that a dump reads like the model.
    """

    def __init__(self, graph: ir.Graph, *, insert_before: ir.Node | None = None) -> None:
        self.graph = graph
        self.scope = ""
        self._anchor = insert_before
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._numbers: dict[str, int] = {}
        self.created: list[ir.Node] = []

    # -- values ------------------------------------------------------------------------------------------------

    def input(self, name: str, dtype: DType, shape: Sequence[Dim]) -> ir.Value:
        """A graph input; a string is a symbolic dimension."""
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(IR_TYPES[dtype]))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str) -> None:
        """Makes `value` a graph output called `name`."""
        value.name = name
        self.graph.outputs.append(value)

    def weight(self, name: str, recipe: Recipe) -> ir.Value:
        """The initializer `name`; asking twice gives the same value."""
        existing = self.graph.initializers.get(name)
        if existing is not None:
            assert isinstance(existing.const_value, Weight) and existing.const_value.recipe == recipe, name
            return existing
        weight = Weight(name, recipe)
        return self._initializer(name, weight, weight.shape, weight.dtype)

    def constant(self, array: np.ndarray | float | int | Sequence[int], dtype: DType | None = None) -> ir.Value:
        """A small array as an initializer; equal arrays share one."""
        data = np.asarray(array)
        if dtype is not None:
            data = data.astype(dtype.numpy)
        elif data.dtype == np.float64:
            data = data.astype(np.float32)
        key = (data.dtype.name, data.shape, data.tobytes())
        if key not in self._constants:
            self._constants[key] = self._shared_constant(data)
        return self._constants[key]

    def named_constant(self, name: str, array: np.ndarray) -> ir.Value:
        """A table (rotary cosines, masks) with a name of its own; asking twice gives the same value."""
        existing = self.graph.initializers.get(name)
        if existing is not None:
            return existing
        tensor = ir.tensor(array, name=name)
        return self._initializer(name, tensor, ir.Shape(array.shape), tensor.dtype)

    def _shared_constant(self, data: np.ndarray) -> ir.Value:
        """The graph's initializer of these numbers, whichever builder made it first."""
        stem = f"const_{data.item()}" if data.size == 1 else f"const_{'x'.join(map(str, data.shape))}"
        stem = stem.replace("-", "minus_").replace("+", "") + ("" if data.ndim == 0 else "_v") + f"_{data.dtype.name}"
        name, number = stem, 1
        while (existing := self.graph.initializers.get(name)) is not None:
            if existing.const_value is not None and _equal(existing.const_value.numpy(), data):
                return existing
            name, number = f"{stem}_{number}", number + 1
        tensor = ir.tensor(data, name=name)
        return self._initializer(name, tensor, ir.Shape(data.shape), tensor.dtype)

    def _initializer(self, name: str, tensor: Any, shape: ir.Shape, dtype: ir.DataType) -> ir.Value:
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    # -- nodes -------------------------------------------------------------------------------------------------

    def dialect(self, op_type: str, inputs: Sequence[ir.Value | None], name: str = "", **attributes: Any) -> Any:
        """A node of the `trtllm` dialect; its results' types come from the operator table.

        Returns one value, or a tuple when the operator has several outputs.
        """
        operator = OPERATORS[op_type]
        attributes = operator.complete(attributes)
        node = self._append(DOMAIN, op_type, inputs, attributes, operator.output_count(attributes), name)
        infer(node)
        return node.outputs[0] if len(node.outputs) == 1 else tuple(node.outputs)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[Dim] | None = None,
        dtype: DType | ir.DataType | None = None,
        *,
        domain: str = "",
        name: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """A node of another domain with one output.

        `shape` and `dtype` default to those of the first input (element-wise operators).
        """
        return self.multi(op_type, inputs, [(shape, dtype)], domain=domain, name=name, **attributes)[0]

    def multi(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        results: Sequence[tuple[Sequence[Dim] | None, DType | ir.DataType | None]],
        *,
        domain: str = "",
        name: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """A node with one output per (shape, dtype) of `results`."""
        node = self._append(domain, op_type, inputs, attributes, len(results), name)
        first = inputs[0] if inputs else None
        for value, (shape, dtype) in zip(node.outputs, results, strict=True):
            value.shape = _shape_of(shape, first)
            value.type = ir.TensorType(_type_of(dtype, first))
        return list(node.outputs)

    def _append(
        self,
        domain: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: dict[str, Any],
        output_count: int,
        name: str,
    ) -> ir.Node:
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=output_count)
        node.name = self._node_name(name, op_type)
        for index, value in enumerate(node.outputs):
            if node.name:
                value.name = f"{node.name}_out{index or ''}"
        if self._anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self._anchor, node)
        self.created.append(node)
        return node

    def _node_name(self, name: str, op_type: str) -> str | None:
        """Within a scope every node has a name: `layers.0.attention/Reshape`, `layers.0.attention/Reshape_1`."""
        if name or not self.scope:
            return f"{self.scope}{name}" if name else None
        stem = f"{self.scope}{op_type}"
        number = self._numbers.get(stem, 0)
        self._numbers[stem] = number + 1
        return f"{stem}_{number}" if number else stem


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are the same to the last bit."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _shape_of(shape: Sequence[Dim] | None, first: ir.Value | None) -> ir.Shape | None:
    if shape is not None:
        return ir.Shape(shape)
    return first.shape if first is not None else None


def _type_of(dtype: DType | ir.DataType | None, first: ir.Value | None) -> ir.DataType:
    if isinstance(dtype, DType):
        return IR_TYPES[dtype]
    if dtype is not None:
        return dtype
    assert first is not None and first.dtype is not None, "an operator's type comes from its first input"
    return first.dtype


def dims(value: ir.Value) -> tuple[Dim, ...]:
    """The extents of a value: an int, or the name of a symbolic dimension."""
    assert value.shape is not None, f"{value.name} has no shape"
    return tuple(d if isinstance(d, int) else (d.value or "?") for d in value.shape)


def dtype_of(value: ir.Value) -> ir.DataType:
    """The element type of a typed value."""
    assert value.dtype is not None, f"{value.name} has no type"
    return value.dtype
