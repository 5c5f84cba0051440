"""Finds or makes the engine of whatever model a user names, and opens what goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtllm.compiler.engine import MANIFEST, Engine, open_engine
from trtllm.progress import Progress, Silent
from trtllm.runtime.executor import open_engine_session
from trtllm.runtime.llm_config import BuildCacheConfig, DraftTargetDecodingConfig, LlmArgs
from trtllm.runtime.tokenizer import Tokenizer


def engine_of(model: Any, tokenizer: Any, args: LlmArgs, progress: Progress) -> Engine:
    """The engine that `model` is or names; for a model, the one of the engine cache, which is built if need be."""
    if isinstance(model, Engine):
        return model
    if isinstance(model, str | Path) and (Path(model).expanduser() / MANIFEST).is_file():
        return open_engine(Path(model).expanduser(), verify=args.verify)
    return _built_engine(model, tokenizer, args, progress)


def _built_engine(model: Any, tokenizer: Any, args: LlmArgs, progress: Progress) -> Engine:
    """The runtime's door to the build: a machine that only runs engines never comes here."""
    from trtllm.compiler.engine_cache import build_engine_uncached, cached_engine
    from trtllm.config import build_config

    build = build_config(args.build_options)
    given = None if isinstance(model, str | Path) else tokenizer
    if args.enable_build_cache is False:
        return build_engine_uncached(model, build, tokenizer=given, progress=progress)
    cache = args.enable_build_cache if isinstance(args.enable_build_cache, BuildCacheConfig) else BuildCacheConfig()
    return cached_engine(
        model,
        build,
        cache_root=cache.cache_root,
        max_records=cache.max_records,
        max_cache_storage_gb=cache.max_cache_storage_gb,
        tokenizer=given,
        verify=args.verify,
        progress=progress,
    )


def tokenizer_of(engine: Engine, given: Any) -> Tokenizer:
    """The tokenizer that a user gave, or the engine's."""
    if isinstance(given, Tokenizer):
        return given
    return Tokenizer.from_directory(given if isinstance(given, str | Path) else engine.path)


def draft_session(args: LlmArgs) -> Any:
    """The session of the model that drafts; None without one."""
    if not isinstance(args.speculative_config, DraftTargetDecodingConfig):
        return None
    engine = engine_of(args.speculative_config.speculative_model, None, args, Silent())
    return open_engine_session(engine, LlmArgs(threads=args.threads, max_batch_size=args.max_batch_size))
