"""Loads an engine's graph into onnxruntime, with the project's own operators, and binds arrays to it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.compiler.engine import ENGINE, Engine
from trtllm.compiler.stripping import refuse_stripped
from trtllm.errors import TargetError

NUMPY_TYPES = {"FLOAT": np.float32, "FLOAT16": np.float16, "INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8}
"""By the name that config.json gives a graph input's type."""


def bind(bind_one: Any, name: str, array: np.ndarray, shape: tuple[int, ...] | None = None) -> None:
    """Binds an array, or the first elements of its memory in another shape, as an input or output."""
    bind_one(name, "cpu", 0, array.dtype.type, list(array.shape if shape is None else shape), array.ctypes.data)


def load(engine: Engine, threads: int | None) -> Any:
    """The engine's graph as an onnxruntime session. Raises TargetError when this machine cannot run it."""
    refuse_stripped(engine)
    try:
        import onnxruntime
    except ImportError:
        raise TargetError("running this engine needs onnxruntime", "pip install onnxruntime") from None
    _check_version(engine, onnxruntime.__version__)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    register_operators(options)
    try:
        return onnxruntime.InferenceSession(
            str(engine.path / ENGINE), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise TargetError(
            f"onnxruntime {onnxruntime.__version__} cannot load {engine.path / ENGINE}: {str(error).splitlines()[0]}",
            f"the engine was built with onnxruntime {engine.manifest.target.version}; install that version or rebuild",
        ) from error


def register_operators(options: Any) -> None:
    """Makes the project's own kernels known to the session; they lie beside the extension module."""
    from trtllm import _native

    library = next(Path(_native.__file__).parent.glob("libtrtllm_operators.*"), None)
    if library is None:
        raise TargetError(
            f"the CPU kernels are missing beside {_native.__file__}", "reinstall the package: it compiles them"
        )
    options.register_custom_ops_library(str(library))


def _check_version(engine: Engine, installed: str) -> None:
    needed = engine.manifest.target.minimum_version
    if _numbers(installed) < _numbers(needed):
        raise TargetError(
            f"{engine.path} needs onnxruntime {needed} or later, {installed} is installed",
            f"pip install 'onnxruntime>={needed}'",
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
