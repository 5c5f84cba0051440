"""Loads TensorRT plans: the one place of the runtime that knows the library, its flavours and its versions."""

from __future__ import annotations

import importlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtllm.compiler.engine import ENGINE, Engine
from trtllm.compiler.stripping import refuse_stripped
from trtllm.errors import ResourceError, TargetError
from trtllm.runtime.cuda.driver import Device, Stream

_ITEM_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT32": 4, "INT64": 8, "INT8": 1, "BOOL": 1, "UINT8": 1, "FP8": 1}


@dataclass(frozen=True)
class Flavour:
    """A library that runs plans."""

    name: str
    module: str
    distribution: str
    refused_capabilities: frozenset[str] = frozenset()


FLAVOURS = {
    "tensorrt": Flavour("TensorRT", "tensorrt", "tensorrt"),
    "tensorrt-rtx": Flavour("TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx", frozenset({"90"})),
}
_NEEDED_DRIVER = {"8": 12000, "9": 12000, "10": 12000}
"""By major version of TensorRT, in the driver's own counting; later ones and TensorRT-RTX are made for CUDA 13."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a plan; free extents are -1."""

    name: str
    is_input: bool
    item_nbytes: int
    shape: tuple[int, ...]


class Context:
    """A plan at work on one profile: addresses and extents are set once, then it is queued any number of times."""

    def __init__(self, context: Any, log: list[str]) -> None:
        self._context, self._log = context, log

    def set_input(self, name: str, shape: tuple[int, ...], address: int) -> None:
        """Raises TargetError when the plan's profile does not have the shape."""
        if not self._context.set_input_shape(name, shape):
            raise TargetError(f"the plan refuses {name} of {shape}: {_last(self._log)}", "build the engine again")
        self.set_address(name, address)

    def set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise TargetError(f"the plan refuses the address of {name}: {_last(self._log)}", "build the engine again")

    def enqueue(self, stream: Stream) -> None:
        """Queues one run. Raises TargetError when the library refuses."""
        if not self._context.execute_async_v3(stream.handle):
            raise TargetError(f"TensorRT refused a step: {_last(self._log)}", "the request may be tried again")


class Plan:
    """A deserialized plan: its tensors, and how often its inputs are planned for."""

    def __init__(self, engine: Engine, device: Device) -> None:
        """Raises TargetError when this machine cannot run the engine, ResourceError when memory does not suffice."""
        refuse_stripped(engine)
        self._device = device
        self._module, version = _loaded(engine)
        _check(engine, version, device)
        self._log: list[str] = []
        self._logger = _logger(self._module, self._log)
        self._runtime = self._module.Runtime(self._logger)
        self._engine = self._deserialized(engine, version)
        self.tensors: Mapping[str, TensorInfo] = {info.name: info for info in self._tensor_infos()}
        self.num_profiles = int(self._engine.num_optimization_profiles)
        self._is_recent = hasattr(self._engine, "device_memory_size_v2")
        self.scratch_nbytes = int(
            self._engine.device_memory_size_v2 if self._is_recent else self._engine.device_memory_size
        )
        """What a context needs beside its inputs and outputs; contexts that never run at the same time may share it."""

    def _deserialized(self, engine: Engine, version: str) -> Any:
        with (engine.path / ENGINE).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            plan = self._runtime.deserialize_cuda_engine(data)
        if plan is None:
            message = _last(self._log)
            if "memory" in message.lower():
                raise ResourceError(
                    f"the GPU has no room for {engine.path}: {message}",
                    f"{self._device.free_bytes() >> 20} MiB are free; end what else runs there, or build smaller",
                )
            raise TargetError(
                f"TensorRT {version} cannot load {engine.path / ENGINE}: {message}",
                f"it was built with {engine.manifest.target.version}; build it again on this machine",
            )
        return plan

    def _tensor_infos(self) -> list[TensorInfo]:
        engine, infos = self._engine, []
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            is_input = engine.get_tensor_mode(name) == self._module.TensorIOMode.INPUT
            width = _ITEM_BYTES[engine.get_tensor_dtype(name).name]
            infos.append(TensorInfo(name, is_input, width, tuple(engine.get_tensor_shape(name))))
        return infos

    def largest_shape(self, name: str, profile: int) -> tuple[int, ...]:
        """The largest extents of an input in a profile."""
        return tuple(self._engine.get_tensor_profile_shape(name, profile)[2])

    def context(self, profile: int, scratch: int, stream: Stream) -> Context:
        """A context on a profile, whose scratch memory is at `scratch`. The stream is waited for."""
        if self._is_recent:
            strategy = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
            context = self._engine.create_execution_context(strategy)
        else:
            context = self._engine.create_execution_context_without_device_memory()
        if context is None:
            raise ResourceError(
                f"TensorRT cannot make a context: {_last(self._log)}", "end what else runs on the GPU, or build smaller"
            )
        if self._is_recent:
            context.set_device_memory(scratch, self.scratch_nbytes)
        else:
            context.device_memory = scratch
        if not context.set_optimization_profile_async(profile, stream.handle):
            raise TargetError(f"the plan has no profile {profile}: {_last(self._log)}", "build the engine again")
        self._device.synchronize(stream)
        return Context(context, self._log)


def _loaded(engine: Engine) -> tuple[Any, str]:
    """The library that made the engine, and its version. Raises TargetError when it is not there or does not load."""
    flavour = _flavour_of(engine)
    made_with = engine.manifest.target.version
    install = f"pip install '{flavour.distribution}=={made_with}'"
    try:
        module = importlib.import_module(flavour.module)
    except ModuleNotFoundError as error:
        if error.name != flavour.module:
            raise TargetError(f"{flavour.name} does not load: {error}", install) from error
        raise TargetError(f"{engine.path} needs {flavour.name} {made_with}, which is not installed", install) from None
    except (ImportError, OSError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise TargetError(f"{flavour.name} does not load: {first}", install) from error
    return module, str(module.__version__)


def _flavour_of(engine: Engine) -> Flavour:
    name = engine.manifest.target.flavour or "tensorrt"
    if name not in FLAVOURS:
        raise TargetError(
            f"{engine.path} is a plan of '{name}', which is not known here",
            f"known are {', '.join(FLAVOURS)}; load it with the version that built it",
        )
    return FLAVOURS[name]


def _check(engine: Engine, version: str, device: Device) -> None:
    """Raises TargetError for a plan that this library, GPU or driver does not run, before it is read."""
    flavour, target = _flavour_of(engine), engine.manifest.target
    if version != target.version:
        raise TargetError(
            f"{engine.path} was built with {flavour.name} {target.version}, installed is {version}: a plan runs with "
            "the version that made it",
            f"pip install '{flavour.distribution}=={target.version}', or build the engine again",
        )
    wanted = 13000 if flavour.module == "tensorrt_rtx" else _NEEDED_DRIVER.get(version.split(".")[0], 13000)
    if device.driver_version < wanted:
        raise TargetError(
            f"the driver of {device.name} knows CUDA {_cuda(device.driver_version)}, {flavour.name} {version} needs "
            f"{_cuda(wanted)}",
            "install a newer NVIDIA driver",
        )
    if device.compute_capability in flavour.refused_capabilities:
        raise TargetError(
            f"{flavour.name} does not run on {device.name} (compute capability {_dotted(device.compute_capability)})",
            "build the engine with TensorRT on this machine",
        )
    built_for = target.compute_capabilities
    if built_for and device.compute_capability not in built_for:
        raise TargetError(
            f"{engine.path} was built for compute capability {', '.join(map(_dotted, built_for))}, {device.name} has "
            f"{_dotted(device.compute_capability)}",
            "build the engine again on this machine, or on one with such a GPU",
        )


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _dotted(capability: str) -> str:
    return capability if "." in capability else f"{capability[:-1]}.{capability[-1]}"


def _logger(module: Any, log: list[str]) -> Any:
    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                log.append(message)
                del log[:-8]

    return Logger()


def _last(log: list[str]) -> str:
    """The newest error of the library in one line."""
    return " ".join(log[-1].split()) if log else "it says no reason"
