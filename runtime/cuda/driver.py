"""An NVIDIA GPU through its driver: memory, streams, graphs, kernels. The one place that knows cuda-bindings.

Addresses are integers. Work is queued on a stream and done in order; whatever it reads or writes must stay as it is
until `synchronize` has returned. Every thread that calls must have called `make_current` once.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtllm.errors import ResourceError, TargetError

CPU_HINT = "build the model with --target onnxruntime to run it on a CPU"


@dataclass(frozen=True, eq=False)
class Memory:
    """A piece of the GPU's memory, which goes with this object."""

    address: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class PinnedMemory:
    """Memory of the host that the GPU reads and writes by itself, at the same address; it goes with this object."""

    address: int
    bytes: np.ndarray
    """uint8; views of it do not keep it alive."""


@dataclass(frozen=True, eq=False)
class Stream:
    """A queue of work."""

    handle: int
    native: Any


class Arguments:
    """The arguments of a kernel, in the form that a launch takes. Integers of 64 bits (addresses) and of 32."""

    def __init__(self, addresses: tuple[int, ...], integers: tuple[int, ...]) -> None:
        values: list[Any] = [ctypes.c_uint64(address) for address in addresses]
        values += [ctypes.c_int32(integer) for integer in integers]
        self.values = values
        self._pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))

    @property
    def address(self) -> int:
        return ctypes.addressof(self._pointers)


class Device:
    """One GPU, in the context that CUDA's own libraries share."""

    def __init__(self, ordinal: int = 0) -> None:
        """Raises TargetError when there is no driver or no such GPU."""
        self._api: Any = _bindings()
        self._threads: set[int] = set()
        api = self._api
        try:
            (status,) = api.cuInit(0)
        except RuntimeError as error:
            raise TargetError(f"this machine has no NVIDIA driver: {error}", CPU_HINT) from None
        if status != api.CUresult.CUDA_SUCCESS:
            raise TargetError(f"the NVIDIA driver finds no GPU: {_name(status)}", f"see nvidia-smi; {CPU_HINT}")
        count = self._call("cuDeviceGetCount")
        if ordinal >= count:
            raise TargetError(f"GPU {ordinal} is asked for, this machine has {count}", "see nvidia-smi")
        device = self._call("cuDeviceGet", ordinal)
        attribute = api.CUdevice_attribute
        major = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._call("cuDeviceGetAttribute", attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        self.name: str = self._call("cuDeviceGetName", 256, device).rstrip(b"\0").decode()
        self.compute_capability = f"{major}{minor}"
        """As in "90"."""
        self.driver_version: int = self._call("cuDriverGetVersion")
        """The newest CUDA that the driver knows: 1000 * major + 10 * minor."""
        self._context = self._call("cuDevicePrimaryCtxRetain", device)
        self.make_current()

    def make_current(self) -> None:
        """Lets the calling thread use the GPU."""
        thread = threading.get_ident()
        if thread not in self._threads:
            self._call("cuCtxSetCurrent", self._context)
            self._threads.add(thread)

    # -- memory ------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Memory:
        """Memory on the GPU, aligned to 256 bytes. Raises ResourceError when there is not enough."""
        address = int(self._call("cuMemAlloc", max(nbytes, 1)))
        memory = Memory(address, nbytes)
        weakref.finalize(memory, _free, self._api, self._context, "cuMemFree", address).atexit = False
        return memory

    def pinned(self, nbytes: int) -> PinnedMemory:
        """Memory on the host, zeroed. Raises ResourceError when there is not enough."""
        address = int(self._call("cuMemHostAlloc", max(nbytes, 1), int(self._api.CU_MEMHOSTALLOC_PORTABLE)))
        memory_view: Any = (ctypes.c_uint8 * max(nbytes, 1)).from_address(address)
        array = np.frombuffer(memory_view, np.uint8)
        array[:] = 0
        memory = PinnedMemory(address, array)
        weakref.finalize(memory, _free, self._api, self._context, "cuMemFreeHost", address).atexit = False
        return memory

    def free_bytes(self) -> int:
        """Of the GPU's memory."""
        return int(self._call("cuMemGetInfo")[0])

    def to_device(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self._call("cuMemcpyHtoDAsync", target, source, nbytes, stream.native)

    def to_host(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self._call("cuMemcpyDtoHAsync", target, source, nbytes, stream.native)

    def on_device(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copies within the GPU's memory."""
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, stream.native)

    def clear(self, target: int, nbytes: int, stream: Stream) -> None:
        """Fills memory with zeros."""
        self._call("cuMemsetD8Async", target, 0, nbytes, stream.native)

    # -- streams, events, graphs ---------------------------------------------------------------------------------

    def stream(self) -> Stream:
        native = self._call("cuStreamCreate", int(self._api.CUstream_flags.CU_STREAM_NON_BLOCKING))
        return Stream(int(native), native)

    def synchronize(self, stream: Stream) -> None:
        """Waits until all work of the stream is done. Raises TargetError for what failed meanwhile."""
        self._call("cuStreamSynchronize", stream.native)

    def event(self) -> Any:
        """A mark for `record`, which takes the time."""
        return self._call("cuEventCreate", 0)

    def record(self, event: Any, stream: Stream) -> None:
        self._call("cuEventRecord", event, stream.native)

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Between two recorded events whose stream has been waited for."""
        return float(self._call("cuEventElapsedTime", begin, end))

    def begin_capture(self, stream: Stream) -> None:
        """Work that is queued from now on is noted, not done. Other threads go on as they like."""
        mode = self._api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream.native, mode)

    def end_capture(self, stream: Stream) -> Any:
        """The work that was noted, to be launched any number of times. Raises TargetError when some cannot be."""
        graph = self._call("cuStreamEndCapture", stream.native)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            _quietly(self._api.cuGraphDestroy, graph)

    def abandon_capture(self, stream: Stream) -> None:
        """Ends a capture that failed; the stream can be used again."""
        _, graph = self._api.cuStreamEndCapture(stream.native)
        if graph is not None and int(graph):
            _quietly(self._api.cuGraphDestroy, graph)

    def launch_graph(self, graph: Any, stream: Stream) -> None:
        self._call("cuGraphLaunch", graph, stream.native)

    # -- kernels -----------------------------------------------------------------------------------------------

    def kernels(self, ptx: bytes) -> Kernels:
        """Compiles PTX for this GPU. Raises TargetError when the driver cannot."""
        image = ctypes.create_string_buffer(ptx)
        return Kernels(self._api, self._call("cuModuleLoadData", ctypes.addressof(image)))

    def launch(self, kernel: Any, grid: tuple[int, int], threads: int, arguments: Arguments, stream: Stream) -> None:
        self._call("cuLaunchKernel", kernel, grid[0], grid[1], 1, threads, 1, 1, 0, stream.native, arguments.address, 0)

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of a driver's function, None for one without."""
        status, *results = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            raise _failure(name, status, arguments)
        if not results:
            return None
        return results[0] if len(results) == 1 else results


class Kernels:
    """The kernels of one module."""

    def __init__(self, api: Any, module: Any) -> None:
        self._api, self._module = api, module

    def kernel(self, name: str) -> Any:
        status, function = self._api.cuModuleGetFunction(self._module, name.encode())
        if int(status) != 0:
            raise _failure("cuModuleGetFunction", status, (name,))
        return function


def open_device(ordinal: int = 0) -> Device:
    """The GPU that sessions run on. Raises TargetError when there is none."""
    return Device(ordinal)


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise TargetError(
            f"running this engine needs cuda-bindings: {error}", "pip install 'cuda-bindings>=12.8'"
        ) from None
    return driver


def _name(status: Any) -> str:
    return str(getattr(status, "name", status))


def _failure(name: str, status: Any, arguments: tuple[Any, ...]) -> Exception:
    if _name(status) == "CUDA_ERROR_OUT_OF_MEMORY":
        wanted = f" for {arguments[0] >> 20} MiB" if name in ("cuMemAlloc", "cuMemHostAlloc") else ""
        place = "host" if name == "cuMemHostAlloc" else "GPU"
        return ResourceError(
            f"the {place} has no memory left{wanted} ({name})",
            "end what else runs there, or build with a smaller cache, batch or sequence length",
        )
    return TargetError(
        f"the NVIDIA driver refused {name}: {_name(status)}",
        "see `nvidia-smi` and the system's log; after an illegal access the process must be started again",
    )


def _free(api: Any, context: Any, name: str, address: int) -> None:
    """Whichever thread collects the garbage need not have used the GPU before."""
    _quietly(api.cuCtxSetCurrent, context)
    _quietly(getattr(api, name), address)


def _quietly(function: Any, argument: Any) -> None:
    with contextlib.suppress(Exception):
        function(argument)
