"""The public face of the toolchain: names are imported on first use, so `import trtllm` stays light."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm.compiler.pipeline import compile
    from trtllm.config import BuildConfig
    from trtllm.errors import TrtllmError, UsageError
    from trtllm.runtime.dispatcher import RequestHandle
    from trtllm.runtime.embedder import Embedder
    from trtllm.runtime.guided_decoding import GuidedDecodingParams
    from trtllm.runtime.llm import LLM
    from trtllm.runtime.llm_config import (
        BuildCacheConfig,
        CapacitySchedulerPolicy,
        ContextChunkingPolicy,
        DraftTargetDecodingConfig,
        KvCacheConfig,
        KvCacheRetentionConfig,
        NGramDecodingConfig,
        SchedulerConfig,
        TokenRangeRetentionConfig,
    )
    from trtllm.runtime.outputs import CompletionOutput, Logprob, RequestOutput
    from trtllm.runtime.sampling import LookaheadDecodingConfig, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "trtllm.runtime.llm",
    "Embedder": "trtllm.runtime.embedder",
    "SamplingParams": "trtllm.runtime.sampling",
    "LookaheadDecodingConfig": "trtllm.runtime.sampling",
    "GuidedDecodingParams": "trtllm.runtime.guided_decoding",
    "RequestOutput": "trtllm.runtime.outputs",
    "CompletionOutput": "trtllm.runtime.outputs",
    "Logprob": "trtllm.runtime.outputs",
    "RequestHandle": "trtllm.runtime.dispatcher",
    "BuildCacheConfig": "trtllm.runtime.llm_config",
    "CapacitySchedulerPolicy": "trtllm.runtime.llm_config",
    "ContextChunkingPolicy": "trtllm.runtime.llm_config",
    "DraftTargetDecodingConfig": "trtllm.runtime.llm_config",
    "KvCacheConfig": "trtllm.runtime.llm_config",
    "KvCacheRetentionConfig": "trtllm.runtime.llm_config",
    "NGramDecodingConfig": "trtllm.runtime.llm_config",
    "SchedulerConfig": "trtllm.runtime.llm_config",
    "TokenRangeRetentionConfig": "trtllm.runtime.llm_config",
    "compile": "trtllm.compiler.pipeline",
    "BuildConfig": "trtllm.config",
    "TrtllmError": "trtllm.errors",
    "UsageError": "trtllm.errors",
}

__all__ = [
    "LLM",
    "BuildCacheConfig",
    "BuildConfig",
    "CapacitySchedulerPolicy",
    "CompletionOutput",
    "ContextChunkingPolicy",
    "DraftTargetDecodingConfig",
    "Embedder",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "KvCacheRetentionConfig",
    "Logprob",
    "LookaheadDecodingConfig",
    "NGramDecodingConfig",
    "RequestHandle",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "TokenRangeRetentionConfig",
    "TrtllmError",
    "UsageError",
    "compile",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'trtllm' has no attribute '{name}'")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
