"""A TensorRT network under construction: the tensors of our values, constants, and what must stay alive."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.weights import DTYPES, Weight
from trtllm.compiler.targets.tensorrt.diagnostics import Log, readable
from trtllm.compiler.targets.tensorrt.library import Library
from trtllm.dtypes import DType
from trtllm.errors import TargetError

Payload = Callable[[Weight], np.ndarray]


class Emission:
    """Adds layers for the nodes of one graph.

    `payload` gives a weight's bytes, which are referenced until the plan is built. A constant is made at the rank that
    its reader wants, so that no layer is spent on broadcasting.
    """

    def __init__(self, library: Library, network: Any, payload: Payload, log: Log, *, longest: int = 0) -> None:
        """`longest` is the largest extent that is counted, where counting is cutting a constant."""
        self.library = library
        self.trt = library.module
        self.network = network
        self.node: ir.Node | None = None
        self.longest = longest
        self._payload = payload
        self._log = log
        self._tensors: dict[int, Any] = {}
        self._constants: dict[tuple[Any, ...], Any] = {}
        self._shapes: dict[int, Any] = {}
        self._casts: dict[tuple[int, DType], Any] = {}
        self._alive: list[Any] = []
        self._names: dict[str, int] = {}

    # -- layers ------------------------------------------------------------------------------------------------

    def add(self, method: str, *arguments: Any) -> Any:
        """The layer that the network's `method` makes, named after the node in hand."""
        return self.named(self._call(getattr(self.network, method), *arguments))

    def out(self, method: str, *arguments: Any) -> Any:
        """The first output of `add`."""
        return self.add(method, *arguments).get_output(0)

    def named(self, layer: Any) -> Any:
        """Names a fresh layer. Raises TargetError that names the node when the library refused to make it."""
        if layer is None:
            raise self.refusal(self._log.first_error())
        label = self.label
        number = self._names.get(label, 0)
        self._names[label] = number + 1
        layer.name = f"{label}.{number}" if number else label
        return layer

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            raise self.refusal(self._log.first_error() or str(error)) from error

    @property
    def label(self) -> str:
        """The node in hand, for people."""
        if self.node is None:
            return "network"
        return self.node.name or self.node.outputs[0].name or self.node.op_type

    def refusal(self, reason: str) -> TargetError:
        where = f"{self.node.op_type} '{self.label}'" if self.node is not None else "the network"
        return TargetError(
            f"{self.library.flavour.name} refuses {where}: {readable(reason) or 'it says no reason'}",
            "this is a limit of the library or a defect of the toolchain; try another --dtype or --quantization",
        )

    def check(self, results: list[Any]) -> None:
        """Raises TargetError when the library found an error in the node in hand.

        It looks at a layer only when somebody asks for the shape of its result, so this asks.
        """
        for tensor in results:
            if tensor is not None:
                self._call(lambda tensor=tensor: tuple(tensor.shape))
        if self._log.errors:
            raise self.refusal(self._log.first_error())

    # -- values ------------------------------------------------------------------------------------------------

    def bind(self, value: ir.Value, tensor: Any) -> None:
        """Makes `tensor` the tensor of a value."""
        self._tensors[id(value)] = tensor

    def of(self, value: ir.Value | None, rank: int | None = None) -> Any:
        """The tensor of a value, with leading extents of 1 up to `rank`."""
        assert value is not None, f"{self.label} lacks an input"
        own_rank = len(dims(value))
        rank = max(own_rank, rank or 0)
        if value.const_value is not None:
            return self._constant_of(value, rank)
        tensor = self._tensors[id(value)]
        return tensor if rank == own_rank else self.expanded(tensor, list(range(rank - own_rank)))

    def expanded(self, tensor: Any, axes: list[int]) -> Any:
        """`tensor` with new extents of 1 at `axes` of the result."""
        if hasattr(self.network, "add_unsqueeze"):
            return self.out("add_unsqueeze", tensor, self.integers(axes))
        rank = len(tensor.shape) + len(axes)
        own = iter(range(rank - len(axes)))
        return self._rearranged(tensor, [None if axis in axes else next(own) for axis in range(rank)])

    def squeezed(self, tensor: Any, axes: list[int]) -> Any:
        """`tensor` without its extents of 1 at `axes`."""
        if hasattr(self.network, "add_squeeze"):
            return self.out("add_squeeze", tensor, self.integers(axes))
        return self._rearranged(tensor, [axis for axis in range(len(tensor.shape)) if axis not in axes])

    def _rearranged(self, tensor: Any, axes: list[int | None]) -> Any:
        """`tensor` with the extents of its own `axes` in this order, None being an extent of 1.

        A constant shape says it where at most one extent that varies has moved; otherwise the shape is computed.
        """
        extents = tuple(int(extent) for extent in tensor.shape)
        shape, moved = [], 0
        for place, axis in enumerate(axes):
            if axis is None or extents[axis] >= 0:
                shape.append(1 if axis is None else extents[axis])
            elif axis == place:
                shape.append(0)
            else:
                shape.append(-1)
                moved += 1
        if moved <= 1:
            return self.reshaped(tensor, tuple(shape))
        ones = self.add("add_concatenation", [self.shape_of(tensor), self.integers([1])])
        ones.axis = 0
        places = self.integers([len(extents) if axis is None else axis for axis in axes])
        layer = self.add("add_shuffle", tensor)
        layer.set_input(1, self.out("add_gather", ones.get_output(0), places, 0))
        return layer.get_output(0)

    def _constant_of(self, value: ir.Value, rank: int) -> Any:
        tensor = value.const_value
        assert tensor is not None
        own = tuple(int(extent) for extent in dims(value))
        shape = (1,) * (rank - len(own)) + own
        if isinstance(tensor, Weight):
            made, whole = self._weight_of(value, tensor, own, rank)
            return whole if made == rank else self.reshaped(whole, shape)
        key = ("value", id(value), rank)
        if key not in self._constants:
            dtype = DTYPES[dtype_of(value)]
            self._constants[key] = self._constant(shape, dtype, np.array(tensor.numpy(), dtype.numpy, order="C"))
        return self._constants[key]

    def _weight_of(self, value: ir.Value, weight: Weight, shape: tuple[int, ...], rank: int) -> tuple[int, Any]:
        """One constant a weight however many read it: a second one would be stored twice. Returns its rank too.

        It has the rank that its first reader wants: what reshapes a weight that may change is computed every time.
        """
        key = ("weight", id(value))
        if key not in self._constants:
            data, shape = self._payload(weight), (1,) * (rank - len(shape)) + shape
            self._constants[key] = rank, self._constant(shape, weight.recipe.dtype, data, value.name or "")
        made: tuple[int, Any] = self._constants[key]
        return made

    def stored(self, value: ir.Value | None, type_name: str, shape: tuple[int, ...]) -> Any:
        """A weight's bytes as a constant of one of the library's types, which ours need not have a name for."""
        assert value is not None and isinstance(value.const_value, Weight), f"{self.label} lacks a weight"
        key = ("stored", id(value))
        if key not in self._constants:
            data = self._payload(value.const_value)
            self._alive.append(data)
            weights = self.library.raw_weights(type_name, data, prod(shape))
            self._alive.append(weights)
            layer = self._call(self.network.add_constant, shape, weights)
            if layer is None:
                raise self.refusal(self._log.first_error())
            layer.name = value.name
            self.network.set_weights_name(weights, value.name)
            self._constants[key] = layer.get_output(0)
        return self._constants[key]

    def _constant(self, shape: tuple[int, ...], dtype: DType, data: np.ndarray, weight_name: str = "") -> Any:
        dtype, data = self.library.narrowed(dtype, data)
        self._alive.append(data)
        weights = self.library.weights(dtype, data, prod(shape))
        self._alive.append(weights)
        layer = self._call(self.network.add_constant, shape, weights)
        if layer is None:
            raise self.refusal(self._log.first_error())
        if weight_name:
            layer.name = weight_name
            self.network.set_weights_name(weights, weight_name)
        return layer.get_output(0)

    def number(self, number: float, dtype: DType, rank: int) -> Any:
        """A constant scalar of a type, at a rank; equal ones are one."""
        key = ("number", number, dtype, rank)
        if key not in self._constants:
            self._constants[key] = self._constant((1,) * rank, dtype, np.full(1, number, dtype=dtype.numpy))
        return self._constants[key]

    def integers(self, numbers: list[int]) -> Any:
        """A constant int64 vector; equal ones are one."""
        key = ("integers", tuple(numbers))
        if key not in self._constants:
            data = np.asarray(numbers, dtype=np.int64)
            self._constants[key] = self._constant(data.shape, DType.INT64, data)
        return self._constants[key]

    # -- small compositions --------------------------------------------------------------------------------------

    def cast(self, tensor: Any, dtype: DType) -> Any:
        """`tensor` as `dtype`; itself when it is, one layer however often it is asked for."""
        wanted = self.library.data_type(dtype)
        if tensor.dtype == wanted:
            return tensor
        key = (id(tensor), dtype)
        if key not in self._casts:
            self._alive.append(tensor)
            self._casts[key] = self.out("add_cast", tensor, wanted)
        return self._casts[key]

    def quantized(self, tensor: Any, scale: Any, type_name: str, *, axis: int = -1) -> Any:
        """`tensor` rounded by one scale, or by one for each element of `axis`."""
        return self._along(
            axis, self.named(self._call(self.library.add_quantize, self.network, tensor, scale, type_name))
        )

    def dequantized(self, tensor: Any, scale: Any, dtype: DType, *, axis: int = -1) -> Any:
        """The inverse of `quantized`."""
        return self._along(
            axis, self.named(self._call(self.library.add_dequantize, self.network, tensor, scale, dtype))
        )

    @staticmethod
    def _along(axis: int, layer: Any) -> Any:
        if axis >= 0:
            layer.axis = axis
        return layer.get_output(0)

    def binary(self, left: Any, right: Any, operation: str) -> Any:
        return self.out("add_elementwise", left, right, getattr(self.trt.ElementWiseOperation, operation))

    def unary(self, tensor: Any, operation: str) -> Any:
        return self.out("add_unary", tensor, getattr(self.trt.UnaryOperation, operation))

    def reduced(self, tensor: Any, operation: str, axes: list[int], *, keeps: bool) -> Any:
        mask = sum(1 << axis for axis in axes)
        return self.out("add_reduce", tensor, getattr(self.trt.ReduceOperation, operation), mask, keeps)

    def reshaped(self, tensor: Any, shape: tuple[int, ...]) -> Any:
        """`tensor` under a constant shape; 0 copies the extent, -1 is what remains."""
        layer = self.add("add_shuffle", tensor)
        layer.reshape_dims = shape
        return layer.get_output(0)

    def transposed(self, tensor: Any, permutation: list[int]) -> Any:
        layer = self.add("add_shuffle", tensor)
        layer.first_transpose = self.trt.Permutation(permutation)
        return layer.get_output(0)

    def shape_of(self, tensor: Any) -> Any:
        """The extents of a tensor, int64; one layer a tensor."""
        key = id(tensor)
        if key not in self._shapes:
            self._alive.append(tensor)
            self._shapes[key] = self.out("add_shape", tensor)
        return self._shapes[key]
