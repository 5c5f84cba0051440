"""A stand-in for TensorRT 8.6 that has the names of the real module and no others, checks ranks and types as it does,
and computes every layer in numpy.

`tensorrt_8_6_names.json` lists the public names of each class of the real module. Tensors hold the values of two runs
of other sizes: an extent in which they differ is one that varies.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAMES = json.loads(Path(__file__).with_name("tensorrt_8_6_names.json").read_text())
RUNS = 2


class _Member:
    """A member of one of the module's enumerations."""

    def __init__(self, owner: str, name: str, value: int) -> None:
        self.owner, self.name, self._value = owner, name, value

    def __int__(self) -> int:
        return self._value

    def __repr__(self) -> str:
        return f"{self.owner}.{self.name}"


class _Enumeration:
    def __init__(self, name: str) -> None:
        for value, member in enumerate(item for item in NAMES["classes"][name] if item.isupper() or "_" in item):
            setattr(self, member, _Member(name, member, value))


class Strict:
    """An object whose public attributes are those of a class of the real module."""

    _real = ""

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in NAMES["classes"][self._real]:
            raise AttributeError(f"TensorRT 8.6 has no {self._real}.{name}")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in NAMES["classes"][self._real]:
            raise NotImplementedError(f"the stand-in does not model {self._real}.{name}")
        raise AttributeError(f"TensorRT 8.6 has no {self._real}.{name}")


DataType = _Enumeration("DataType")
_TO_NUMPY = {
    DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT32: np.int32, DataType.BOOL: np.bool_,
    DataType.INT8: np.int8,
}  # fmt: skip
_OF_NUMPY = {np.dtype(value): key for key, value in _TO_NUMPY.items()}


class Weights:
    """Takes a numpy array alone, as 8.6 does."""

    def __init__(self, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray) and array.flags.c_contiguous
        self.array = array
        self.dtype = _OF_NUMPY[array.dtype]


class Tensor(Strict):
    _real = "ITensor"

    def __init__(self, values: Callable[[], list[np.ndarray]], name: str = "") -> None:
        self._make, self._known = values, None
        self.name = name

    @property
    def _values(self) -> list[np.ndarray]:
        if self._known is None:
            self._known = self._make()
        return self._known

    @property
    def shape(self) -> tuple[int, ...]:
        first, second = (value.shape for value in self._values)
        assert len(first) == len(second)
        return tuple(a if a == b else -1 for a, b in zip(first, second, strict=True))

    @property
    def dtype(self) -> Any:
        return _OF_NUMPY[self._values[0].dtype]

    @dtype.setter
    def dtype(self, wanted: Any) -> None:
        assert self.dtype is wanted, f"output {self.name} is {self.dtype}, {wanted} is asked for"

    def set_dimension_name(self, axis: int, name: str) -> None:
        assert 0 <= axis < len(self.shape) and name


class Layer(Strict):
    """A layer that computes each run from its inputs when its result is asked for."""

    _real = "ILayer"

    def __init__(
        self, kind: str, inputs: Sequence[Tensor | None], compute: Callable[..., Any], outputs: int = 1
    ) -> None:
        self._inputs: list[Tensor | None] = list(inputs)
        self.type = getattr(LayerType, kind)
        self._compute, self._results = compute, None
        self.num_outputs = outputs
        self._outputs = [Tensor(lambda index=index: [run[index] for run in self._runs()]) for index in range(outputs)]

    def _runs(self) -> list[list[np.ndarray]]:
        if self._results is None:
            self._results = []
            for run in range(RUNS):
                values = [tensor._values[run] if tensor is not None else None for tensor in self._inputs]
                result = self._compute(self, *values)
                results = list(result) if self.num_outputs > 1 else [result]
                self._results.append([np.asarray(item) for item in results])
        return self._results

    def get_output(self, index: int) -> Tensor:
        return self._outputs[index]

    def get_input(self, index: int) -> Tensor | None:
        return self._inputs[index]

    def set_input(self, index: int, tensor: Tensor) -> None:
        assert tensor.dtype is DataType.INT32, "sizes and shapes are int32"
        while len(self._inputs) <= index:
            self._inputs.append(None)
        self._inputs[index] = tensor

    def set_output_type(self, index: int, dtype: Any) -> None:
        assert self.get_output(index).dtype is dtype


def _layer_class(real: str) -> type[Layer]:
    return type(real, (Layer,), {"_real": real})


LayerType = _Enumeration("LayerType")
ElementWiseOperation = _Enumeration("ElementWiseOperation")
UnaryOperation = _Enumeration("UnaryOperation")
ReduceOperation = _Enumeration("ReduceOperation")
ActivationType = _Enumeration("ActivationType")
MatrixOperation = _Enumeration("MatrixOperation")
TopKOperation = _Enumeration("TopKOperation")
GatherMode = _Enumeration("GatherMode")
ScatterMode = _Enumeration("ScatterMode")
MemoryPoolType = _Enumeration("MemoryPoolType")
BuilderFlag = _Enumeration("BuilderFlag")
NetworkDefinitionCreationFlag = _Enumeration("NetworkDefinitionCreationFlag")
ProfilingVerbosity = _Enumeration("ProfilingVerbosity")
HardwareCompatibilityLevel = _Enumeration("HardwareCompatibilityLevel")
_Shuffle, _Concatenation, _Softmax, _Gather, _Scatter = (
    _layer_class(name)
    for name in ("IShuffleLayer", "IConcatenationLayer", "ISoftMaxLayer", "IGatherLayer", "IScatterLayer")
)
_Quantize, _Dequantize = _layer_class("IQuantizeLayer"), _layer_class("IDequantizeLayer")
_Elementwise, _Slice = _layer_class("IElementWiseLayer"), _layer_class("ISliceLayer")


def Permutation(axes: Sequence[int]) -> list[int]:
    return list(axes)


def _wide(value: np.ndarray) -> np.ndarray:
    return value.astype(np.float32) if value.dtype == np.float16 else value


def _elementwise(layer: Any, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    name = layer._operation.name
    assert left.ndim == right.ndim, f"ranks {left.ndim} and {right.ndim} of {layer.name}"
    assert left.dtype == right.dtype, f"types {left.dtype} and {right.dtype} of {layer.name}"
    assert all(a == b or 1 in (a, b) for a, b in zip(left.shape, right.shape, strict=True)), layer.name
    assert (left.dtype == np.bool_) == (name in ("AND", "OR", "XOR")), f"{name} of {left.dtype}"
    a, b = _wide(left), _wide(right)
    result = {
        "SUM": np.add, "SUB": np.subtract, "PROD": np.multiply, "DIV": np.divide, "MAX": np.maximum,
        "MIN": np.minimum, "POW": np.power, "EQUAL": np.equal, "LESS": np.less, "GREATER": np.greater,
        "AND": np.logical_and, "OR": np.logical_or,
    }[name](a, b)  # fmt: skip
    return result if result.dtype == np.bool_ else result.astype(left.dtype)


def _erf(x: np.ndarray) -> np.ndarray:
    from math import erf

    return np.vectorize(erf, otypes=[np.float32])(x)


def _unary(layer: Any, x: np.ndarray) -> np.ndarray:
    name = layer._operation.name
    if name == "NOT":
        assert x.dtype == np.bool_
        return np.logical_not(x)
    assert x.dtype in (np.float32, np.float16) or name in ("ABS", "NEG"), f"{name} of {x.dtype}"
    result = {
        "SQRT": np.sqrt, "EXP": np.exp, "LOG": np.log, "NEG": np.negative, "ABS": np.abs, "SIN": np.sin,
        "COS": np.cos, "ERF": _erf, "RECIP": np.reciprocal,
    }[name](_wide(x))  # fmt: skip
    return result.astype(x.dtype)


def _activation(layer: Any, x: np.ndarray) -> np.ndarray:
    assert x.dtype in (np.float32, np.float16)
    wide = _wide(x)
    with np.errstate(over="ignore"):
        result = {
            "RELU": lambda v: np.maximum(v, 0), "TANH": np.tanh, "SIGMOID": lambda v: 1 / (1 + np.exp(-v)),
        }[layer._operation.name](wide)  # fmt: skip
    return result.astype(x.dtype)


def _reduce(layer: Any, x: np.ndarray) -> np.ndarray:
    axes = tuple(axis for axis in range(x.ndim) if layer._axes >> axis & 1)
    function = {"SUM": np.sum, "AVG": np.mean, "MAX": np.max, "MIN": np.min, "PROD": np.prod}[layer._operation.name]
    assert x.dtype != np.bool_
    return function(_wide(x), axis=axes, keepdims=layer._keeps).astype(x.dtype)


def _matmul(layer: Any, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    assert left.ndim == right.ndim >= 2 and left.dtype == right.dtype and left.dtype in (np.float32, np.float16)
    a, b = _wide(left), _wide(right)
    turns = [operation is MatrixOperation.TRANSPOSE for operation in layer._operation]
    a, b = (np.swapaxes(x, -1, -2) if turn else x for x, turn in zip((a, b), turns, strict=True))
    return np.matmul(a, b).astype(left.dtype)


def _shuffle(layer: Any, x: np.ndarray, shape: np.ndarray | None = None) -> np.ndarray:
    given = layer.__dict__
    if "first_transpose" in given:
        x = x.transpose(layer.first_transpose)
    if shape is not None or "reshape_dims" in given:
        wanted = [int(extent) for extent in (layer.reshape_dims if shape is None else shape)]
        assert wanted.count(-1) <= 1
        x = x.reshape([x.shape[axis] if extent == 0 else extent for axis, extent in enumerate(wanted)])
    return x.transpose(layer.second_transpose) if "second_transpose" in given else x


def _slice(layer: Any, x: np.ndarray, start: Any = None, size: np.ndarray | None = None) -> np.ndarray:
    sizes = layer._size if size is None else [int(extent) for extent in size]
    assert len(sizes) == len(layer._start) == len(layer._stride) == x.ndim
    places = []
    for axis, (first, count, stride) in enumerate(zip(layer._start, sizes, layer._stride, strict=True)):
        indices = first + stride * np.arange(count)
        assert count == 0 or 0 <= indices.min() <= indices.max() < x.shape[axis], (
            f"{layer.name} reads beyond axis {axis}"
        )
        places.append(indices)
    return x[np.ix_(*places)]


def _gather(layer: Any, data: np.ndarray, indices: np.ndarray) -> np.ndarray:
    assert indices.dtype == np.int32
    if layer._mode is GatherMode.ELEMENT:
        return np.take_along_axis(data, indices, layer.axis)
    assert indices.size == 0 or 0 <= indices.min() <= indices.max() < data.shape[layer._axis]
    return np.take(data, indices, layer._axis)


def _scatter(layer: Any, data: np.ndarray, indices: np.ndarray, updates: np.ndarray) -> np.ndarray:
    assert layer._mode is ScatterMode.ELEMENT and indices.dtype == np.int32 and data.dtype == updates.dtype
    result = data.copy()
    np.put_along_axis(result, indices, updates, layer.axis)
    return result


def _concat(layer: Any, *parts: np.ndarray) -> np.ndarray:
    assert len({part.dtype for part in parts}) == 1
    return np.concatenate(parts, layer.axis)


def _softmax(layer: Any, x: np.ndarray) -> np.ndarray:
    axis = int(layer.axes).bit_length() - 1
    powers = np.exp(_wide(x) - _wide(x).max(axis, keepdims=True))
    return (powers / powers.sum(axis, keepdims=True)).astype(x.dtype)


def _topk(layer: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    assert x.dtype in (np.float32, np.float16) and layer._count <= 3840
    axis = int(layer._axes).bit_length() - 1
    sign = -1 if layer._operation is TopKOperation.MAX else 1
    order = np.argsort(sign * _wide(x), axis=axis, kind="stable").take(range(layer._count), axis)
    return np.take_along_axis(x, order, axis), order.astype(np.int32)


def _scale_along(layer: Any, rank: int, scale: np.ndarray) -> np.ndarray:
    """A scale for all, or one for each element of the layer's axis."""
    assert scale.dtype == np.float32 and (scale > 0).all() and scale.ndim == (1 if "axis" in layer.__dict__ else 0)
    return scale.reshape([-1 if axis == layer.axis else 1 for axis in range(rank)]) if scale.ndim else scale


def _quantize(layer: Any, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    assert x.dtype == np.float32, "what is rounded has the type of its scale"
    return np.clip(np.rint(x / _scale_along(layer, x.ndim, scale)), -128, 127).astype(np.int8)


def _dequantize(layer: Any, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    assert x.dtype == np.int8
    return x.astype(np.float32) * _scale_along(layer, x.ndim, scale)


def _select(layer: Any, condition: np.ndarray, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    assert condition.dtype == np.bool_ and yes.dtype == no.dtype and condition.ndim == yes.ndim == no.ndim
    return np.where(condition, yes, no)


class Network(Strict):
    """INetworkDefinition over given values of its inputs, one for each run."""

    _real = "INetworkDefinition"

    def __init__(self, feeds: Callable[[str, int], np.ndarray]) -> None:
        self._feeds = feeds
        self._layers: list[Layer] = []
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._weight_names: dict[str, Weights] = {}

    # What the library counts.

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> Layer:
        return self._layers[index]

    def add_input(self, name: str, dtype: Any, shape: Sequence[int]) -> Tensor:
        values = [self._feeds(name, run) for run in range(RUNS)]
        tensor = Tensor(lambda: values, name)
        assert tensor.shape == tuple(shape) and tensor.dtype is dtype, f"{name}: {tensor.shape} {tensor.dtype}"
        self._inputs.append(tensor)
        return tensor

    def mark_output(self, tensor: Tensor) -> None:
        self._outputs.append(tensor)

    def set_weights_name(self, weights: Weights, name: str) -> bool:
        assert name not in self._weight_names
        self._weight_names[name] = weights
        return True

    # Layers.

    def _keep(self, layer: Layer, **settings: Any) -> Layer:
        for name, value in settings.items():
            object.__setattr__(layer, f"_{name}", value)
        self._layers.append(layer)
        return layer

    def add_constant(self, shape: Sequence[int], weights: Weights) -> Layer:
        value = weights.array.reshape(shape)
        return self._keep(Layer("CONSTANT", [], lambda layer: value))

    def add_elementwise(self, left: Tensor, right: Tensor, operation: _Member) -> Layer:
        return self._keep(_Elementwise("ELEMENTWISE", [left, right], _elementwise), operation=operation)

    def add_unary(self, x: Tensor, operation: _Member) -> Layer:
        return self._keep(Layer("UNARY", [x], _unary), operation=operation)

    def add_activation(self, x: Tensor, operation: _Member) -> Layer:
        return self._keep(Layer("ACTIVATION", [x], _activation), operation=operation)

    def add_reduce(self, x: Tensor, operation: _Member, axes: int, keeps: bool) -> Layer:
        return self._keep(Layer("REDUCE", [x], _reduce), operation=operation, axes=axes, keeps=keeps)

    def add_matrix_multiply(self, left: Tensor, first: _Member, right: Tensor, second: _Member) -> Layer:
        return self._keep(Layer("MATRIX_MULTIPLY", [left, right], _matmul), operation=(first, second))

    def add_shuffle(self, x: Tensor) -> Layer:
        return self._keep(_Shuffle("SHUFFLE", [x], _shuffle))

    def add_slice(self, x: Tensor, start: Sequence[int], size: Sequence[int], stride: Sequence[int]) -> Layer:
        return self._keep(_Slice("SLICE", [x], _slice), start=start, size=size, stride=stride)

    def add_gather(self, data: Tensor, indices: Tensor, axis: int) -> Layer:
        return self._keep(_Gather("GATHER", [data, indices], _gather), mode=GatherMode.DEFAULT, axis=axis)

    def add_gather_v2(self, data: Tensor, indices: Tensor, mode: _Member) -> Layer:
        return self._keep(_Gather("GATHER", [data, indices], _gather), mode=mode)

    def add_scatter(self, data: Tensor, indices: Tensor, updates: Tensor, mode: _Member) -> Layer:
        return self._keep(_Scatter("SCATTER", [data, indices, updates], _scatter), mode=mode)

    def add_concatenation(self, parts: list[Tensor]) -> Layer:
        return self._keep(_Concatenation("CONCATENATION", parts, _concat))

    def add_softmax(self, x: Tensor) -> Layer:
        return self._keep(_Softmax("SOFTMAX", [x], _softmax))

    def add_topk(self, x: Tensor, operation: _Member, count: int, axes: int) -> Layer:
        return self._keep(Layer("TOPK", [x], _topk, 2), operation=operation, count=count, axes=axes)

    def add_cast(self, x: Tensor, dtype: _Member) -> Layer:
        return self._keep(Layer("CAST", [x], lambda layer, value: value.astype(_TO_NUMPY[dtype])))

    def add_select(self, condition: Tensor, yes: Tensor, no: Tensor) -> Layer:
        return self._keep(Layer("SELECT", [condition, yes, no], _select))

    def add_quantize(self, x: Tensor, scale: Tensor) -> Layer:
        return self._keep(_Quantize("QUANTIZE", [x, scale], _quantize))

    def add_dequantize(self, x: Tensor, scale: Tensor) -> Layer:
        return self._keep(_Dequantize("DEQUANTIZE", [x, scale], _dequantize))

    def add_shape(self, x: Tensor) -> Layer:
        return self._keep(Layer("SHAPE", [x], lambda layer, value: np.asarray(value.shape, np.int32)))


class Profile(Strict):
    _real = "IOptimizationProfile"

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, name: str, least: Any, expected: Any, most: Any) -> None:
        self._shapes[name] = (least, expected, most)


class _TimingCache(Strict):
    _real = "ITimingCache"

    def serialize(self) -> bytes:
        return b"measured"


class Config(Strict):
    _real = "IBuilderConfig"

    def __init__(self) -> None:
        self._set: set[str] = set()
        self._profiles: list[Profile] = []

    def set_memory_pool_limit(self, pool: _Member, nbytes: int) -> None:
        self._limits = {pool.name: nbytes}

    def set_flag(self, flag: _Member) -> None:
        self._set.add(flag.name)

    def clear_flag(self, flag: _Member) -> None:
        self._set.discard(flag.name)

    def add_optimization_profile(self, profile: Profile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, data: bytes) -> _TimingCache:
        return _TimingCache()

    def set_timing_cache(self, cache: _TimingCache, ignores_mismatch: bool) -> bool:
        return True

    def get_timing_cache(self) -> _TimingCache:
        return _TimingCache()


class ILogger(Strict):
    _real = "ILogger"
    VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR = "verbose", "info", "warning", "error", "internal error"
    min_severity = WARNING

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


class Builder(Strict):
    """Gives its last network and config to whoever made the module."""

    _real = "Builder"

    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)

    def create_builder_config(self) -> Config:
        _state["config"] = Config()
        return _state["config"]

    def create_network(self, flags: int) -> Network:
        assert flags == 1 << int(NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
        _state["network"] = Network(_state["feeds"])
        return _state["network"]

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes:
        for tensor in network._outputs:
            assert all(value.shape is not None for value in tensor._values)
        stored = io.BytesIO()
        np.savez(stored, **{name: weights.array for name, weights in network._weight_names.items()})
        kind = "refittable" if "REFIT" in config._set else "fixed"
        return f"plan of {len(network._layers)} layers, {kind}\n".encode() + stored.getvalue()


class _Engine(Strict):
    _real = "ICudaEngine"

    def __init__(self, plan: bytes) -> None:
        self._title, stored = plan.split(b"\n", 1)
        with np.load(io.BytesIO(stored)) as arrays:
            self._weights = {name: arrays[name] for name in arrays.files}

    @property
    def refittable(self) -> bool:
        return b"refittable" in self._title

    def serialize(self) -> bytes:
        stored = io.BytesIO()
        np.savez(stored, **self._weights)
        return self._title + b"\n" + stored.getvalue()


class Runtime(Strict):
    _real = "Runtime"

    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        return _Engine(bytes(plan)) if bytes(plan).startswith(b"plan of") else None


class Refitter(Strict):
    """Takes weights by name, but for those that `fold` named."""

    _real = "Refitter"

    def __init__(self, engine: _Engine, logger: ILogger) -> None:
        assert engine.refittable and isinstance(logger, ILogger)
        self._engine, self._given = engine, {}

    def get_all_weights(self) -> list[str]:
        return [name for name in self._engine._weights if name not in _state.get("folded", ())]

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        known = self._engine._weights[name]
        self._given[name] = weights.array
        return bool(weights.array.size == known.size and weights.array.dtype == known.dtype)

    def get_missing_weights(self) -> list[str]:
        return []

    def refit_cuda_engine(self) -> bool:
        for name, array in self._given.items():
            self._engine._weights[name] = array.reshape(self._engine._weights[name].shape).copy()
        return True


def fold(*names: str) -> None:
    """Makes plans that do not take these weights by name."""
    _state["folded"] = names


def weights_of(plan: bytes) -> dict[str, np.ndarray]:
    """The named weights inside a plan."""
    return _Engine(plan)._weights


_state: dict[str, Any] = {}


def feed(values: Callable[[str, int], np.ndarray]) -> None:
    """Sets what the next network's inputs are, by name and run."""
    _state["feeds"] = values


def last(what: str) -> Any:
    """The "network" or the "config" that was made last."""
    return _state[what]


def results(run: int) -> dict[str, np.ndarray]:
    """The outputs of the last network in a run."""
    return {tensor.name: tensor._values[run] for tensor in _state["network"]._outputs}


__version__ = NAMES["version"]
