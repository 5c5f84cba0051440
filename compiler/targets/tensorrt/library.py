"""The TensorRT library at hand: the one place that knows its flavours and what differs between their versions."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.compiler.targets.tensorrt.versions import FULL_NAME, RTX_NAME, TensorRtVersion, parse_version, version_of
from trtllm.config import BuildConfig
from trtllm.dtypes import DType
from trtllm.errors import TargetError


@dataclass(frozen=True)
class Flavour:
    """A library that builds plans."""

    name: str
    module: str
    distribution: str
    minimum_version: str
    builds_without_gpu: bool = False


RTX = Flavour(RTX_NAME, "tensorrt_rtx", "tensorrt-rtx", "1.7", builds_without_gpu=True)
FULL = Flavour(FULL_NAME, "tensorrt", "tensorrt", "8.6")
FLAVOURS = (RTX, FULL)

_TYPES = {
    DType.FLOAT32: "FLOAT",
    DType.FLOAT16: "HALF",
    DType.BFLOAT16: "BF16",
    DType.INT64: "INT64",
    DType.INT32: "INT32",
    DType.INT8: "INT8",
    DType.INT4: "INT4",
    DType.BOOL: "BOOL",
}
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True, eq=False)
class Library:
    """An imported flavour."""

    flavour: Flavour
    module: Any
    version: str

    @property
    def release(self) -> TensorRtVersion:
        return version_of(self.flavour.name, self.version)

    # -- what differs ----------------------------------------------------------------------------------------------

    @property
    def is_rtx(self) -> bool:
        return self.flavour.name == RTX_NAME

    @property
    def is_strongly_typed(self) -> bool:
        """Whether every type is the graph's; otherwise types are wishes that precisions make binding."""
        return hasattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    @property
    def narrows_integers(self) -> bool:
        """Whether int64 becomes int32."""
        return not self.is_rtx and self.release.numbers < (10, 15)

    @property
    def quantizes_float32(self) -> bool:
        """Whether what is rounded has the type of its scale, which is float32."""
        return not self.is_rtx and self.release.numbers < (10, 15)

    def data_type(self, dtype: DType) -> Any:
        if dtype is DType.INT64 and self.narrows_integers:
            dtype = DType.INT32
        return getattr(self.module.DataType, _TYPES[dtype])

    def narrowed(self, dtype: DType, data: np.ndarray) -> tuple[DType, np.ndarray]:
        """A constant as the library takes it. Ends that mean "beyond everything" become the largest int32."""
        if dtype is not DType.INT64 or not self.narrows_integers:
            return dtype, data
        return DType.INT32, np.ascontiguousarray(np.clip(data, _INT32.min, _INT32.max).astype(np.int32))

    def create_network(self, builder: Any) -> Any:
        """A network with explicit batch whose types are the graph's, where the version has such."""
        flags = self.module.NetworkDefinitionCreationFlag
        if self.is_strongly_typed:
            return builder.create_network(1 << int(flags.STRONGLY_TYPED))
        return builder.create_network(1 << int(flags.EXPLICIT_BATCH))

    def weights(self, dtype: DType, data: np.ndarray, count: int) -> Any:
        """A reference to host memory, which must stay as it is until the plan is built."""
        if not self.is_rtx and self.release.numbers < (9,):
            return self.module.Weights(data.reshape(-1).view(dtype.numpy))
        return self.module.Weights(self.data_type(dtype), data.ctypes.data, count)

    def raw_weights(self, type_name: str, data: np.ndarray, count: int) -> Any:
        """The same of bytes in one of the library's types, which ours need not have a name for."""
        if not self.is_rtx and self.release.numbers < (9,):
            assert type_name == "FLOAT", f"version 8 takes no constants of {type_name}"
            return self.module.Weights(data.reshape(-1).view(np.float32))
        return self.module.Weights(getattr(self.module.DataType, type_name), data.ctypes.data, count)

    def add_quantize(self, network: Any, tensor: Any, scale: Any, type_name: str) -> Any:
        """Rounds by a scale; version 8 rounds to int8 alone."""
        if not self.is_rtx and self.release.numbers < (9,):
            return network.add_quantize(tensor, scale)
        return network.add_quantize(tensor, scale, getattr(self.module.DataType, type_name))

    def add_dequantize(self, network: Any, tensor: Any, scale: Any, dtype: DType) -> Any:
        """The inverse; what version 8 makes is float32."""
        if not self.is_rtx and self.release.numbers < (9,):
            return network.add_dequantize(tensor, scale)
        return network.add_dequantize(tensor, scale, self.data_type(dtype))

    def add_attention(self, network: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        """Softmax(query key', where mask holds) value; unscaled."""
        softmax = self.module.AttentionNormalizationOp.SOFTMAX
        if hasattr(network, "add_attention_v2"):
            attention = network.add_attention_v2(query, key, value, softmax, self.module.CausalMaskKind.NONE)
        else:
            attention = network.add_attention(query, key, value, softmax, False)
        if attention is not None:
            attention.mask = mask
            # float32 and uncommon head sizes have no fused kernel.
            attention.decomposable = True
        return attention

    def set_precisions(self, network: Any) -> int:
        """Holds layers whose result is float32 to float32, where types are only wishes. Returns how many.

        Products stay free: in a graph of halves they are of halves, whatever the library has inferred by now.
        """
        if self.is_strongly_typed:
            return 0
        trt, count = self.module, 0
        kinds = trt.LayerType
        free = (
            kinds.CONSTANT, kinds.SHAPE, kinds.CAST, kinds.MATRIX_MULTIPLY, kinds.QUANTIZE, kinds.DEQUANTIZE
        )  # fmt: skip
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type in free or layer.get_output(0).dtype != trt.DataType.FLOAT:
                continue
            layer.precision = trt.DataType.FLOAT
            for output in range(layer.num_outputs):
                if layer.get_output(output).dtype == trt.DataType.FLOAT:
                    layer.set_output_type(output, trt.DataType.FLOAT)
            count += 1
        return count

    # -- building --------------------------------------------------------------------------------------------------

    def configure(self, config: Any, build: BuildConfig, *, halves: bool, bytes_: bool = False) -> None:
        """Applies the build's options for this library; `halves` says that the graph has 16-bit values, `bytes_` that
        it rounds to 8 bits."""
        flags = self.module.BuilderFlag
        if build.builder_optimization_level is not None:
            config.builder_optimization_level = build.builder_optimization_level
        if build.tensorrt_workspace_mb is not None:
            config.set_memory_pool_limit(self.module.MemoryPoolType.WORKSPACE, build.tensorrt_workspace_mb << 20)
        config.profiling_verbosity = getattr(self.module.ProfilingVerbosity, build.profiling_verbosity.upper())
        if build.weight_streaming:
            config.set_flag(flags.WEIGHT_STREAMING)
        config.clear_flag(flags.TF32)
        if not self.is_strongly_typed and halves:
            config.set_flag(flags.FP16)
            config.set_flag(flags.OBEY_PRECISION_CONSTRAINTS)
        if not self.is_strongly_typed and bytes_:
            config.set_flag(flags.INT8)
        if build.compute_capabilities:
            config.num_compute_capabilities = len(build.compute_capabilities)
            for index, name in enumerate(build.compute_capabilities):
                config.set_compute_capability(getattr(self.module.ComputeCapability, f"SM{name}"), index)
        if build.strip_plan:
            config.set_flag(flags.STRIP_PLAN)
        if self.refits and build.refittable:
            config.set_flag(flags.REFIT)
        if build.version_compatible:
            config.set_flag(flags.VERSION_COMPATIBLE)
        if build.hardware_compatibility_level != "none":
            levels = self.module.HardwareCompatibilityLevel
            config.hardware_compatibility_level = getattr(levels, build.hardware_compatibility_level.upper())

    @property
    def refits(self) -> bool:
        """Whether a plan can be built to take other weights: TensorRT-RTX fails to do so without a GPU."""
        return not self.is_rtx

    def build(self, builder: Any, network: Any, config: Any, write: Any) -> bool:
        """Builds the plan and hands it to `write(bytes-like) -> int`; False when the library refused."""
        if not hasattr(builder, "build_serialized_network_to_stream"):
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                return False
            write(memoryview(plan))
            return True
        stream_class = self.module.IStreamWriter

        class Stream(stream_class):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                stream_class.__init__(self)

            def write(self, data: bytes) -> int:
                return int(write(data))

        return bool(builder.build_serialized_network_to_stream(network, config, Stream()))

    def load_timing_cache(self, config: Any, path: Path) -> None:
        """Gives the builder what earlier builds have measured on this GPU. A file of another kind is no help."""
        data = path.read_bytes() if path.is_file() else b""
        cache = config.create_timing_cache(data)
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def save_timing_cache(self, config: Any, path: Path) -> None:
        """Keeps what this build has measured; the file appears whole."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(bytes(cache.serialize()))
        partial.replace(path)


def load(flavours: Iterable[Flavour] = FLAVOURS, *, version: str | None = None) -> Library:
    """Imports the first flavour that is installed, of the kind of `version` when that is named.

    Raises TargetError with the pip command when none is.
    """
    wanted = parse_version(version) if version else None
    for flavour in flavours:
        if wanted is not None and flavour.name != wanted.flavour:
            continue
        try:
            module = importlib.import_module(flavour.module)
        except ModuleNotFoundError as error:
            if error.name and not error.name.startswith(flavour.module):
                raise _broken(flavour, error) from error
            continue
        except (ImportError, OSError) as error:
            raise _broken(flavour, error) from error
        return Library(flavour, module, _checked_version(flavour, str(module.__version__)))
    if wanted is not None and wanted.flavour == FULL_NAME:
        raise TargetError(
            f"{wanted.label} is not installed here",
            "install it where its GPU is, or write the network here (--emit network) and finish it there",
        )
    raise TargetError(
        "the tensorrt target needs TensorRT-RTX", f"pip install '{RTX.distribution}>={RTX.minimum_version},<1.8'"
    )


def _broken(flavour: Flavour, error: Exception) -> TargetError:
    first = (str(error) or type(error).__name__).splitlines()[0]
    return TargetError(
        f"{flavour.distribution} is installed but does not load: {first}",
        f"pip install --force-reinstall '{flavour.distribution}>={flavour.minimum_version}'",
    )


def _checked_version(flavour: Flavour, version: str) -> str:
    if version_of(flavour.name, version).numbers < version_of(flavour.name, flavour.minimum_version).numbers:
        raise TargetError(
            f"{flavour.distribution} {version} is too old, the tensorrt target needs {flavour.minimum_version}",
            f"pip install --upgrade '{flavour.distribution}>={flavour.minimum_version}'",
        )
    return version
