"""Runs an onnxruntime engine: the key-value cache stays in place, bound as past and present of every step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.compiler.engine import ENGINE, Engine
from trtllm.errors import TargetError, UsageError
from trtllm.runtime.session import SessionLimits, limits_of

_NUMPY = {"FLOAT": np.float32, "FLOAT16": np.float16, "INT64": np.int64}


@dataclass(eq=False)
class _Step:
    """A binding and the arrays it reads and writes, for one number of rows and tokens."""

    binding: Any
    tokens: np.ndarray
    past_lengths: np.ndarray
    logits: np.ndarray


class OnnxRuntimeSession:
    """A decoder engine with its cache of `max_batch_size` slots.

    Cache arrays are touched only where tokens are, so memory grows with what is stored, not with what is reserved.
    """

    def __init__(self, engine: Engine, *, threads: int | None = None) -> None:
        self.limits: SessionLimits = limits_of(engine.config)
        self._session = load(engine, threads)
        self._inputs = [item for item in engine.config["io"]["inputs"] if item["name"].startswith("past_")]
        self._inputs = [item for item in self._inputs if item["name"] != "past_lengths"]
        self._caches = {item["name"]: self._allocate(item) for item in self._inputs}
        self._decode_steps: dict[tuple[int, int], _Step] = {}

    def _allocate(self, item: dict[str, Any]) -> np.ndarray:
        shape = (self.limits.max_batch_size, *item["shape"][1:])
        return np.zeros(shape, dtype=_NUMPY[item["dtype"]])

    def step(self, first_slot: int, tokens: np.ndarray, past_lengths: np.ndarray) -> np.ndarray:
        """See `trtllm.runtime.session.Session.step`."""
        rows, count = tokens.shape
        if rows > 1 and count > 1:
            raise UsageError(f"a step of {rows} rows takes one token a row, got {count}", "step each row by itself")
        step = self._step_for(first_slot, rows, count)
        step.tokens[:] = tokens
        step.past_lengths[:] = past_lengths
        self._session.run_with_iobinding(step.binding)
        return step.logits

    def _step_for(self, first_slot: int, rows: int, count: int) -> _Step:
        if count > 1:
            return self._bind(first_slot, rows, count)
        key = (first_slot, rows)
        if key not in self._decode_steps:
            self._decode_steps[key] = self._bind(first_slot, rows, 1)
        return self._decode_steps[key]

    def _bind(self, first_slot: int, rows: int, count: int) -> _Step:
        binding = self._session.io_binding()
        gathered = count if self.limits.gathers_context_logits else 1
        step = _Step(
            binding,
            np.zeros((rows, count), np.int64),
            np.zeros(rows, np.int64),
            np.empty((rows, gathered, self.limits.vocab_size), np.float32),
        )
        lengths = np.full(rows, count, np.int64)
        for name, array in (("input_ids", step.tokens), ("past_lengths", step.past_lengths), ("lengths", lengths)):
            _bind_array(binding.bind_input, name, array)
        step.binding.keep_alive = lengths
        _bind_array(binding.bind_output, "logits", step.logits)
        for name, cache in self._caches.items():
            view = cache[first_slot : first_slot + rows]
            _bind_array(binding.bind_input, name, view)
            _bind_array(binding.bind_output, name.replace("past_", "present_"), view)
        return step


def _bind_array(bind: Any, name: str, array: np.ndarray) -> None:
    bind(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)


def load(engine: Engine, threads: int | None) -> Any:
    """The engine's graph as an onnxruntime session. Raises TargetError when this machine cannot run it."""
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
