"""Operators that move, cut and count: nothing is computed but extents."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.weights import DTYPES
from trtllm.compiler.targets.tensorrt.emission import Emission

ENDLESS = 2**31 - 1
"""An end beyond every extent."""


def constant_integers(e: Emission, value: ir.Value | None) -> list[int]:
    """The numbers of a constant input. Raises TargetError when it is computed."""
    if value is None or value.const_value is None:
        raise e.refusal("axes and sizes must be constants")
    return [int(number) for number in np.asarray(value.const_value.numpy()).reshape(-1)]


def reshape(e: Emission, node: ir.Node) -> list[Any]:
    data, shape = node.inputs
    assert shape is not None
    if shape.const_value is not None:
        return [e.reshaped(e.of(data), tuple(constant_integers(e, shape)))]
    layer = e.add("add_shuffle", e.of(data))
    layer.set_input(1, e.of(shape))
    return [layer.get_output(0)]


def is_matrix_transpose(node: ir.Node | None) -> bool:
    """Whether a node swaps the last two axes and nothing else."""
    if node is None or node.domain or node.op_type != "Transpose":
        return False
    permutation = list(node.attributes["perm"].value)
    count = len(permutation)
    return count >= 2 and permutation == [*range(count - 2), count - 1, count - 2]


def transpose(e: Emission, node: ir.Node) -> list[Any]:
    """Nothing for a swapped matrix that only products read: they take it transposed."""
    users = [use.node for use in node.outputs[0].uses()]
    if is_matrix_transpose(node) and all(
        user.op_type == "MatMul" and user.inputs[1] is node.outputs[0] and user.inputs[0] is not node.outputs[0]
        for user in users
    ):
        return [None]
    return [e.transposed(e.of(node.inputs[0]), list(node.attributes["perm"].value))]


def unsqueeze(e: Emission, node: ir.Node) -> list[Any]:
    rank = len(dims(node.outputs[0]))
    axes = sorted(axis % rank for axis in constant_integers(e, node.inputs[1]))
    return [e.expanded(e.of(node.inputs[0]), axes)]


def squeeze(e: Emission, node: ir.Node) -> list[Any]:
    data = node.inputs[0]
    assert data is not None
    axes = [axis % len(dims(data)) for axis in constant_integers(e, node.inputs[1])]
    return [e.squeezed(e.of(data), axes)]


def shape(e: Emission, node: ir.Node) -> list[Any]:
    data = node.inputs[0]
    assert data is not None
    rank = len(dims(data))
    start, stop, _ = slice(
        node.attributes.get_int("start", 0), node.attributes["end"].value if "end" in node.attributes else None
    ).indices(rank)
    whole = e.shape_of(e.of(data))
    if (start, stop) == (0, rank):
        return [whole]
    return [e.out("add_slice", whole, (start,), (stop - start,), (1,))]


def range_(e: Emission, node: ir.Node) -> list[Any]:
    """start, start + step, ...: as many as the limit is steps away."""
    start, limit, step = node.inputs
    numbers = constant_integers(e, step)
    if numbers != [1]:
        raise e.refusal("a range must count by ones")
    if e.library.narrows_integers and constant_integers(e, start) == [0]:
        return [_counted(e, limit)]
    count = e.binary(e.of(limit, 1), e.of(start, 1), "SUB")
    dtype = e.library.data_type(DTYPES[dtype_of(node.outputs[0])])
    layer = e.add("add_fill", (1,), e.trt.FillOperation.LINSPACE, dtype)
    layer.set_input(0, count)
    layer.set_input(1, e.of(start))
    layer.set_input(2, e.of(step, 1))
    return [layer.get_output(0)]


def _counted(e: Emission, limit: ir.Value | None) -> Any:
    """0, 1, ... below a scalar: so much of a constant. Fill layers of old versions count in float32."""
    assert limit is not None
    producer = limit.producer()
    vector = producer.inputs[0] if producer is not None and producer.op_type == "Squeeze" else limit
    layer = e.add("add_slice", e.integers(list(range(e.longest))), (0,), (1,), (1,))
    layer.set_input(2, e.of(vector, 1))
    return layer.get_output(0)


def concat(e: Emission, node: ir.Node) -> list[Any]:
    layer = e.add("add_concatenation", [e.of(value) for value in node.inputs])
    layer.axis = node.attributes["axis"].value % len(dims(node.outputs[0]))
    return [layer.get_output(0)]


def expand(e: Emission, node: ir.Node) -> list[Any]:
    """A slice whose stride is 0 along the extents of 1 that are repeated."""
    data, target = node.inputs
    assert data is not None
    rank = len(dims(node.outputs[0]))
    tensor = e.of(data, rank)
    extents = (1,) * (rank - len(dims(data))) + dims(data)
    strides = [int(extent != 1) for extent in extents]
    size = e.binary(e.shape_of(tensor), e.of(target), "MAX")
    layer = e.add("add_slice", tensor, (0,) * rank, (1,) * rank, tuple(strides))
    layer.set_input(2, size)
    return [layer.get_output(0)]


def split(e: Emission, node: ir.Node) -> list[Any]:
    data = node.inputs[0]
    assert data is not None
    axis = node.attributes.get_int("axis", 0) % len(dims(data))
    parts, start = [], 0
    for value in node.outputs:
        size = dims(value)[axis]
        assert isinstance(size, int), "the pieces of a split have constant sizes"
        parts.append(_piece(e, data, axis, start, size))
        start += size
    return parts


def slice_(e: Emission, node: ir.Node) -> list[Any]:
    """ONNX Slice along one axis, forwards, from a constant start; the end may be computed, and is then not negative."""
    data, first, end = node.inputs[:3]
    assert data is not None and end is not None
    starts, rank = constant_integers(e, first), len(dims(data))
    axes = constant_integers(e, node.inputs[3]) if len(node.inputs) > 3 else list(range(len(starts)))
    steps = constant_integers(e, node.inputs[4]) if len(node.inputs) > 4 else [1] * len(starts)
    if len(axes) != 1 or steps != [1] or (end.const_value is None and starts[0] < 0):
        raise e.refusal("a slice must be along one axis, by ones, from a constant start")
    axis = axes[0] % rank
    if end.const_value is None:
        return [_until(e, data, axis, starts[0], e.of(end))]
    extent = dims(data)[axis]
    if not isinstance(extent, int):
        raise e.refusal("a slice by constants must be of a constant extent")
    start, stop, _ = slice(starts[0], constant_integers(e, end)[0]).indices(extent)
    return [_piece(e, data, axis, start, max(0, stop - start))]


def _until(e: Emission, data: ir.Value, axis: int, start: int, end: Any) -> Any:
    """Elements start .. end of an axis, where `end` is an int64 vector of one number."""
    tensor, rank = e.of(data), len(dims(data))
    here = [int(index == axis) for index in range(rank)]
    layer = e.add("add_slice", tensor, tuple(start * flag for flag in here), (1,) * rank, (1,) * rank)
    ends = e.binary(e.binary(end, e.integers(here), "PROD"), e.integers([(1 - flag) * ENDLESS for flag in here]), "SUM")
    ends = e.binary(ends, e.shape_of(tensor), "MIN")
    layer.set_input(2, e.binary(ends, e.integers([start * flag for flag in here]), "SUB"))
    return layer.get_output(0)


def _piece(e: Emission, data: ir.Value, axis: int, start: int, size: int) -> Any:
    tensor, rank = e.of(data), len(dims(data))
    here = [int(index == axis) for index in range(rank)]
    layer = e.add("add_slice", tensor, tuple(start * flag for flag in here), (1,) * rank, (1,) * rank)
    others = e.binary(e.shape_of(tensor), e.integers([1 - flag for flag in here]), "PROD")
    layer.set_input(2, e.binary(others, e.integers([size * flag for flag in here]), "SUM"))
    return layer.get_output(0)
