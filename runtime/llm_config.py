"""How an LLM is set up: records with the reference names, and the reference's arguments that have no meaning here."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trtllm.errors import UsageError
from trtllm.records import check_names, field_names, record, setting
from trtllm.runtime.guided_decoding import BACKENDS

BatchedLogitsProcessor = Callable[[list[int], list[int], list[list[int]], list[np.ndarray]], None]
"""Gets ids, sequence indices, tokens and float32 logits [V] of all sequences of a step that asked for it."""


class NameEnum(str, enum.Enum):
    """A choice that is its own name; `enum.StrEnum` of Python 3.11."""

    __str__ = str.__str__


class CapacitySchedulerPolicy(NameEnum):
    """When a waiting request starts."""

    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    MAX_UTILIZATION = "MAX_UTILIZATION"
    STATIC_BATCH = "STATIC_BATCH"


class ContextChunkingPolicy(NameEnum):
    """How prompts share a step."""

    FIRST_COME_FIRST_SERVED = "FIRST_COME_FIRST_SERVED"
    EQUAL_PROGRESS = "EQUAL_PROGRESS"


@record
class SchedulerConfig:
    """How requests share steps."""

    capacity_scheduler_policy: Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"] = "GUARANTEED_NO_EVICT"
    context_chunking_policy: Literal["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"] | None = None
    max_queue_size: int | None = setting(default=None, at_least=0)
    """Requests that may wait; None is no limit."""


@record
class KvCacheConfig:
    """How much is kept of what was computed, and for whom."""

    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    max_tokens: int | None = setting(default=None, at_least=1)
    """Tokens that the cache holds; by default as many as memory allows, at most those of all sequences."""
    free_gpu_memory_fraction: float | None = setting(default=None, above=0, at_most=1)
    """Of the memory that is free once the engine is loaded; on a CPU, of the machine's."""
    host_cache_size: int | None = setting(default=None, at_least=0)
    """Bytes of the second pool that blocks are offloaded to."""
    onboard_blocks: bool = True
    secondary_offload_min_priority: int | None = setting(default=None, at_least=0, at_most=100)
    event_buffer_max_size: int = setting(default=0, at_least=0)
    tokens_per_block: int | None = setting(default=None, at_least=1)
    dtype: Literal["auto"] = "auto"


@record
class TokenRangeRetentionConfig:
    """How long the cache of a range of the prompt's tokens is worth keeping."""

    token_start: int = setting(default=0, at_least=0)
    token_end: int | None = setting(default=None, at_least=1)
    """One past the last token; None is the prompt's end."""
    priority: int = setting(default=35, at_least=0, at_most=100)
    duration_ms: int | None = setting(default=None, at_least=0)


@record
class KvCacheRetentionConfig:
    """What of a request's cache is kept in preference, after it has ended."""

    token_range_retention_configs: list[TokenRangeRetentionConfig] | None = None
    decode_retention_priority: int = setting(default=35, at_least=0, at_most=100)
    decode_duration_ms: int | None = setting(default=None, at_least=0)


@record
class NGramDecodingConfig:
    """Drafts what followed the last time the newest tokens were seen; the output stays what it is without."""

    max_draft_len: int = setting(default=4, at_least=1)
    max_matching_ngram_size: int = setting(default=3, at_least=1)


@record
class DraftTargetDecodingConfig:
    """Drafts with a smaller model of the same tokenizer; the output's distribution stays what it is without."""

    speculative_model: str | Path = ""
    """An engine directory, or a model that is built through the engine cache."""
    max_draft_len: int = setting(default=4, at_least=1)

    def problems(self) -> Iterator[str]:
        """What is wrong with fields taken together."""
        if not str(self.speculative_model):
            yield "speculative_model is missing"


@record
class BuildCacheConfig:
    """Where built engines are kept, and how many."""

    cache_root: str | Path | None = None
    max_records: int = setting(default=10, at_least=1)
    max_cache_storage_gb: float = setting(default=256.0, above=0)


@record
class LlmArgs:
    """The arguments of `LLM` beside the model and its tokenizer; docs/llm-api.md describes them."""

    skip_tokenizer_init: bool = False
    max_batch_size: int | None = setting(default=None, at_least=1)
    max_input_len: int | None = setting(default=None, at_least=1)
    max_seq_len: int | None = setting(default=None, at_least=1)
    max_num_tokens: int | None = setting(default=None, at_least=1)
    max_beam_width: int = setting(default=1, at_least=1)
    dtype: str | None = None
    quantization: str | None = None
    dequantize: bool = False
    target: str | None = None
    kv_cache_config: KvCacheConfig | None = None
    scheduler_config: SchedulerConfig | None = None
    speculative_config: NGramDecodingConfig | DraftTargetDecodingConfig | None = None
    guided_decoding_backend: str | None = None
    batched_logits_processor: BatchedLogitsProcessor | None = None
    enable_chunked_prefill: bool = True
    iter_stats_max_iterations: int = setting(default=1000, at_least=0)
    request_stats_max_iterations: int = setting(default=0, at_least=0)
    perf_trace_max_events: int = setting(default=0, at_least=0)
    return_perf_metrics: bool = False
    threads: int | None = setting(default=None, at_least=1)
    verify: bool = True
    enable_build_cache: bool | BuildCacheConfig = True

    def problems(self) -> Iterator[str]:
        """What is wrong with fields taken together."""
        if self.guided_decoding_backend not in (None, "auto", *BACKENDS):
            yield f"guided_decoding_backend is '{self.guided_decoding_backend}', known: {', '.join(BACKENDS)}"
        if self.max_input_len and self.max_seq_len and self.max_input_len > self.max_seq_len:
            yield f"max_input_len {self.max_input_len} exceeds max_seq_len {self.max_seq_len}"

    @property
    def build_options(self) -> dict[str, Any]:
        """The arguments that a build takes, without those not given."""
        names = ("target", "dtype", "quantization", "max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**given, "dequantize": True} if self.dequantize else given


_ONE_MACHINE = "engines run in one process on one machine"
_OF_THE_REFERENCE: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "tensor_parallel_size": ((1,), _ONE_MACHINE),
    "pipeline_parallel_size": ((1,), _ONE_MACHINE),
    "context_parallel_size": ((1,), _ONE_MACHINE),
    "moe_expert_parallel_size": ((1, None), _ONE_MACHINE),
    "moe_tensor_parallel_size": ((1, None), _ONE_MACHINE),
    "moe_cluster_parallel_size": ((1, None), _ONE_MACHINE),
    "gpus_per_node": ((1, None), _ONE_MACHINE),
    "enable_attention_dp": ((False,), _ONE_MACHINE),
    "orchestrator_type": ((None,), _ONE_MACHINE),
    "backend": ((None,), "the engine's target decides what runs it; target= chooses it for a build"),
    "tokenizer_mode": (("auto",), "there is one kind of tokenizer, that of tokenizer.json"),
    "trust_remote_code": ((False,), "a model's own Python code is never run"),
    "revision": ((None,), "write the revision after the hub id: 'org/name@revision'"),
    "tokenizer_revision": ((None,), "the tokenizer is the engine's"),
    "load_format": (("auto",), "weights come from the model's files"),
    "enable_lora": ((False,), "adapters are merged before a build"),
    "lora_config": ((None,), "adapters are merged before a build"),
    "gather_generation_logits": ((True, False), ""),
    "num_postprocess_workers": ((0,), "text is made in the process itself"),
    "fast_build": ((True, False), ""),
    "enable_tqdm": ((True, False), ""),
    "normalize_log_probs": ((False, None), "log probabilities are those of the model's own distribution"),
}
"""Arguments of the reference that mean nothing here: the values that ask for what is the case anyway, and why."""


def llm_args(values: Mapping[str, Any]) -> LlmArgs:
    """Checked arguments. Raises UsageError for unknown names, wrong values, and what engines do not do."""
    for name, (harmless, reason) in _OF_THE_REFERENCE.items():
        if name in values and values[name] not in harmless:
            raise UsageError(f"LLM does not take {name}={values[name]!r}: {reason}", "leave the argument out")
    own = {name: value for name, value in values.items() if name not in _OF_THE_REFERENCE}
    check_names("LLM", own, ["tokenizer", *field_names(LlmArgs)])
    return LlmArgs(**own)
