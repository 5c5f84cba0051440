"""The TensorRT library at hand: the one place that knows its flavours and what differs between their versions."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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


RTX = Flavour("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx", "1.7")
FLAVOURS = (RTX,)

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


@dataclass(frozen=True, eq=False)
class Library:
    """An imported flavour."""

    flavour: Flavour
    module: Any
    version: str

    def data_type(self, dtype: DType) -> Any:
        return getattr(self.module.DataType, _TYPES[dtype])

    def create_network(self, builder: Any) -> Any:
        """A strongly typed network: every type is the graph's."""
        flag = self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return builder.create_network(1 << int(flag))

    def weights(self, dtype: DType, address: int, count: int) -> Any:
        """A reference to host memory, which must stay as it is until the plan is built."""
        return self.module.Weights(self.data_type(dtype), address, count)

    def add_attention(self, network: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
        """Softmax(query key', where mask holds) value; unscaled."""
        softmax = self.module.AttentionNormalizationOp.SOFTMAX
        attention = network.add_attention_v2(query, key, value, softmax, self.module.CausalMaskKind.NONE)
        if attention is not None:
            attention.mask = mask
            # float32 and uncommon head sizes have no fused kernel.
            attention.decomposable = True
        return attention

    def configure(self, config: Any, build: BuildConfig) -> None:
        """Applies the build's options for this library."""
        if build.builder_optimization_level is not None:
            config.builder_optimization_level = build.builder_optimization_level
        config.profiling_verbosity = getattr(self.module.ProfilingVerbosity, build.profiling_verbosity.upper())
        if build.weight_streaming:
            config.set_flag(self.module.BuilderFlag.WEIGHT_STREAMING)
        config.clear_flag(self.module.BuilderFlag.TF32)
        if build.compute_capabilities:
            config.num_compute_capabilities = len(build.compute_capabilities)
            for index, name in enumerate(build.compute_capabilities):
                config.set_compute_capability(getattr(self.module.ComputeCapability, f"SM{name}"), index)

    def build(self, builder: Any, network: Any, config: Any, write: Any) -> bool:
        """Builds the plan and hands it to `write(bytes-like) -> int`; False when the library refused."""
        stream_class = self.module.IStreamWriter

        class Stream(stream_class):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                stream_class.__init__(self)

            def write(self, data: bytes) -> int:
                return int(write(data))

        return bool(builder.build_serialized_network_to_stream(network, config, Stream()))


def load(flavours: Iterable[Flavour] = FLAVOURS) -> Library:
    """Imports the first flavour that is installed. Raises TargetError with the pip command when none is."""
    for flavour in flavours:
        try:
            module = importlib.import_module(flavour.module)
        except ModuleNotFoundError as error:
            if error.name and not error.name.startswith(flavour.module):
                raise _broken(flavour, error) from error
            continue
        except (ImportError, OSError) as error:
            raise _broken(flavour, error) from error
        return Library(flavour, module, _checked_version(flavour, str(module.__version__)))
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
    if _numbers(version) < _numbers(flavour.minimum_version):
        raise TargetError(
            f"{flavour.distribution} {version} is too old, the tensorrt target needs {flavour.minimum_version}",
            f"pip install --upgrade '{flavour.distribution}>={flavour.minimum_version}'",
        )
    return version


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
