"""The public face of the toolchain: names are imported on first use, so `import trtllm` stays light."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm.compiler.pipeline import compile
    from trtllm.config import BuildConfig
    from trtllm.errors import TrtllmError
    from trtllm.runtime.embedder import Embedder
    from trtllm.runtime.llm import LLM
    from trtllm.runtime.outputs import CompletionOutput, RequestOutput
    from trtllm.runtime.sampling import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "trtllm.runtime.llm",
    "Embedder": "trtllm.runtime.embedder",
    "SamplingParams": "trtllm.runtime.sampling",
    "RequestOutput": "trtllm.runtime.outputs",
    "CompletionOutput": "trtllm.runtime.outputs",
    "compile": "trtllm.compiler.pipeline",
    "BuildConfig": "trtllm.config",
    "TrtllmError": "trtllm.errors",
}

__all__ = [
    "LLM",
    "BuildConfig",
    "CompletionOutput",
    "Embedder",
    "RequestOutput",
    "SamplingParams",
    "TrtllmError",
    "compile",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'trtllm' has no attribute '{name}'")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
