"""Opens an engine's session and puts the executor on it; turns the records of an LLM into the executor's config."""

from __future__ import annotations

from typing import Any

from trtllm.compiler.engine import Engine
from trtllm.errors import TargetError, UsageError
from trtllm.memory import available_memory
from trtllm.runtime.llm_config import DraftTargetDecodingConfig, KvCacheConfig, LlmArgs, NGramDecodingConfig
from trtllm.runtime.session import SessionInfo, cache_kind, open_session, session_info

_MEMORY_FRACTION = 0.9
"""Of the free memory, that a cache takes at most when nobody says otherwise."""


def open_engine_session(engine: Engine, args: LlmArgs) -> Any:
    """The session of an engine with its cache. Raises UsageError for limits beyond the engine's."""
    build = engine.config["build_config"]
    for name in ("max_seq_len", "max_input_len", "max_num_tokens"):
        wanted = getattr(args, name)
        if wanted is not None and wanted > build[name]:
            raise UsageError(
                f"{name} {wanted} exceeds the {build[name]} that {engine.path} was built for",
                "build the engine with a larger one, or leave the argument out",
            )
    cache = args.kv_cache_config or KvCacheConfig()
    size = cache.tokens_per_block
    usual = session_info(engine.config, tokens_per_block=size, max_batch_size=args.max_batch_size)
    return open_session(
        engine,
        threads=args.threads,
        num_blocks=_wanted_blocks(engine, usual, cache, args),
        num_host_blocks=(cache.host_cache_size or 0) // _block_bytes(usual),
        tokens_per_block=size,
        max_batch_size=args.max_batch_size,
    )


def _wanted_blocks(engine: Engine, usual: SessionInfo, cache: KvCacheConfig, args: LlmArgs) -> int | None:
    """Blocks of the cache; None for all that the engine was built with."""
    kind = cache_kind(engine.config)
    if kind == "paged":
        return _num_blocks(usual, cache, args)
    if kind == "gathered" and cache.max_tokens is not None:
        return min(-(-cache.max_tokens // usual.cache.tokens_per_block), usual.cache.num_blocks)
    return None


def _num_blocks(usual: SessionInfo, cache: KvCacheConfig, args: LlmArgs) -> int:
    """Blocks of the cache: those of all sequences at their longest, as far as they are wanted and memory allows."""
    size = usual.cache.tokens_per_block
    blocks = usual.max_batch_size * -(-min(args.max_seq_len or usual.max_seq_len, usual.max_seq_len) // size)
    if cache.max_tokens is not None:
        blocks = -(-cache.max_tokens // size)
    free = available_memory()
    if free is None:
        return blocks
    fraction = cache.free_gpu_memory_fraction or _MEMORY_FRACTION
    return max(1, min(blocks, int(free * fraction) // _block_bytes(usual)))


def _block_bytes(info: SessionInfo) -> int:
    return info.cache.tokens_per_block * sum(group.bytes_per_token for group in info.cache.groups)


def new_request() -> Any:
    """An empty request of the executor."""
    return _native().ExecutorRequest()


def new_executor(session: Any, args: LlmArgs, *, draft_session: Any = None) -> Any:
    """An executor that steps `session` on a thread of its own."""
    native = _native()
    return native.Executor(session, executor_config(native.ExecutorConfig(), session.info, args, draft_session))


def executor_config(config: Any, info: SessionInfo, args: LlmArgs, draft_session: Any = None) -> Any:
    """`config`, an empty `trtllm._native.ExecutorConfig`, filled in."""
    config.max_batch_size = info.max_batch_size
    config.max_seq_len = min(args.max_seq_len or info.max_seq_len, info.max_seq_len)
    config.max_num_tokens = min(args.max_num_tokens or info.max_num_tokens, info.max_num_tokens)
    config.max_beam_width = args.max_beam_width
    config.enable_chunked_context = args.enable_chunked_prefill
    config.chunk_unit = min(info.cache.tokens_per_block, config.max_num_tokens)
    config.iter_stats_max_iterations = args.iter_stats_max_iterations
    config.request_stats_max_iterations = args.request_stats_max_iterations
    config.perf_trace_max_events = args.perf_trace_max_events
    config.batched_logits_processor = args.batched_logits_processor
    _set_scheduling(config, args)
    _set_cache(config, args.kv_cache_config or KvCacheConfig())
    _set_speculation(config, args, draft_session)
    return config


def _set_scheduling(config: Any, args: LlmArgs) -> None:
    scheduler = args.scheduler_config
    if scheduler is None:
        return
    config.capacity_scheduler_policy = str(scheduler.capacity_scheduler_policy)
    if scheduler.context_chunking_policy is not None:
        config.context_chunking_policy = str(scheduler.context_chunking_policy)
    if scheduler.max_queue_size is not None:
        config.max_queue_size = scheduler.max_queue_size


def _set_cache(config: Any, cache: KvCacheConfig) -> None:
    config.enable_block_reuse = cache.enable_block_reuse
    config.enable_partial_reuse = cache.enable_partial_reuse
    config.copy_on_partial_reuse = cache.copy_on_partial_reuse
    config.onboard_blocks = cache.onboard_blocks
    config.event_buffer_max_size = cache.event_buffer_max_size
    if cache.secondary_offload_min_priority is not None:
        config.secondary_offload_min_priority = cache.secondary_offload_min_priority


def _set_speculation(config: Any, args: LlmArgs, draft_session: Any) -> None:
    speculation = args.speculative_config
    if isinstance(speculation, NGramDecodingConfig):
        config.ngram_max_draft_len = speculation.max_draft_len
        config.ngram_max_matching_ngram_size = speculation.max_matching_ngram_size
    elif isinstance(speculation, DraftTargetDecodingConfig):
        config.draft_session = draft_session
        config.max_draft_len = speculation.max_draft_len


def _native() -> Any:
    try:
        from trtllm import _native
    except ImportError as error:
        raise TargetError(f"the extension module cannot be loaded: {error}", "install the package again") from None
    if not hasattr(_native, "Executor"):
        raise TargetError("the extension module is older than this package and has no executor", "install it again")
    return _native
