"""What the runtime asks of an engine: a cache of blocks, and steps over packed tokens. Sessions know no requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trtllm.compiler.engine import Engine
from trtllm.errors import TargetError, UsageError


@dataclass(frozen=True)
class SessionLimits:
    """What an engine was built for."""

    max_batch_size: int
    max_seq_len: int
    """Tokens of a prompt and its answer."""
    max_input_len: int
    vocab_size: int
    gathers_context_logits: bool
    """Whether the build asked for logits of every prompt token."""


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share one block table because they see equally far back."""

    window: int
    """Newest tokens that its layers see; 0 = all."""
    num_layers: int
    bytes_per_token: int
    """Of all its layers, keys and values."""


@dataclass(frozen=True)
class CacheShape:
    """The cache that a session has allocated. A linear cache is one whose block is a whole slot."""

    tokens_per_block: int
    num_blocks: int
    """Of the primary pool, for each group."""
    num_host_blocks: int
    """Of the pool that blocks are offloaded to, for each group."""
    groups: tuple[CacheGroup, ...]


@dataclass(frozen=True)
class SessionInfo:
    """What a step may hold. Lengths are tokens."""

    vocab_size: int
    max_seq_len: int
    """Of one sequence, prompt and output together."""
    max_batch_size: int
    """Rows of a step."""
    max_num_tokens: int
    """Tokens of a step."""
    gathers_all_logits: bool
    """False: logits exist of a row's last token only."""
    cache: CacheShape
    num_candidates: int = 0
    """Best logits of a row that come when the row itself need not; 0: rows always come. See `CandidateSession`."""


class Session(Protocol):
    """A decoder engine that is loaded and has its cache."""

    @property
    def info(self) -> SessionInfo: ...

    @property
    def limits(self) -> SessionLimits: ...

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        row_starts: np.ndarray,
        past_lengths: np.ndarray,
        logits_indices: np.ndarray,
        block_tables: Sequence[np.ndarray],
        copies: Sequence[tuple[int, int, int, int]] = (),
    ) -> np.ndarray:
        """Runs packed rows of new tokens: a prompt's chunk, one token, a draft, side by side.

        Args:
            tokens: int64 [T], the rows' new tokens, one row after the other. Without any only the copies are done.
            positions: int64 [T], each token's place in its sequence.
            row_starts: int64 [R + 1], where each row begins in `tokens`; the last is T.
            past_lengths: int64 [R], tokens of the row's sequence that the cache holds already.
            logits_indices: int64 [N], places in `tokens` whose logits are wanted, rising.
            block_tables: for each cache group int32 [R, columns]: token p of a row lies in block p // tokens_per_block
                of its line. A line covers past and new tokens; entries that lie wholly before the window, and those
                behind the row, may be any block.
            copies: (group, source, destination, tokens), done in this order before anything is computed: the first
                tokens of a block in every layer of the group. Block numbers run through the primary pool, then the
                host's; only primary blocks stand in tables.

        Returns float32 logits [N, V], C-contiguous, which the caller may change; they are valid until the next step.
        All arrays given may be reused after the call. Raises UsageError for a step that does not fit.
        """
        ...

    def loaded(self, engine: Engine) -> Callable[[], None]:
        """Loads an engine of the same graph with other weights beside this one, which goes on serving steps.

        Calling the result, between two steps, makes the session compute with it; its cache memory stays, and what is in
        it is of the old weights. Raises TargetError when the engine cannot be loaded.
        """
        ...


class CandidateSession(Session, Protocol):
    """A session that may leave rows of logits where they were computed, and hand out the best of each.

    `step` takes one more argument, whole: bool or uint8 [N], which rows are to come; without it, or where it is empty,
    all are. Other rows of what it returns may hold anything until they are completed.
    """

    def candidates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the last step: the largest logits float32 [N, num_candidates], falling, their tokens int32, and
        log(sum(exp(row))) float32 [N], of rows that were not to come. Valid until the next step."""
        ...

    def complete(self, index: int) -> None:
        """Brings row `index` of the last step's logits into what `step` returned."""
        ...


class EncoderSession(Protocol):
    """An encoder engine that is loaded."""

    def encode(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Runs right-padded tokens int64 [rows, S], of which lengths int64 [rows] are valid.

        Returns float32 embeddings [rows, H], or for an engine without pooling the states [rows, S, H].
        """
        ...


def limits_of(config: Mapping[str, Any]) -> SessionLimits:
    """The limits in an engine's config.json."""
    build = config["build_config"]
    return SessionLimits(
        max_batch_size=build["max_batch_size"],
        max_seq_len=build["max_seq_len"],
        max_input_len=build["max_input_len"],
        vocab_size=config["model"]["vocab_size"],
        gathers_context_logits=build["gather_context_logits"],
    )


def open_session(
    engine: Engine,
    *,
    threads: int | None = None,
    num_blocks: int | None = None,
    num_host_blocks: int = 0,
    tokens_per_block: int | None = None,
    max_batch_size: int | None = None,
) -> Any:
    """The session of an engine's kind and target. Raises TargetError when this machine cannot run it.

    Args:
        threads: of the kernels; all cores by default.
        num_blocks: of the cache, for each group; by default as many as max_batch_size of the longest sequences take.
        num_host_blocks: more blocks, which copies can move others to.
        tokens_per_block: a power of two; engines whose cache is linear take only their max_seq_len.
        max_batch_size: rows of a step, the engine's own by default; an engine with a paged cache takes any.
    """
    if engine.target == "tensorrt":
        return _open_tensorrt(engine, num_blocks, num_host_blocks, tokens_per_block, max_batch_size)
    if engine.target != "onnxruntime":
        raise TargetError(
            f"{engine.path} is an engine for target '{engine.target}', which is not known here",
            "load it with the version that built it",
        )
    if engine.config["model"]["kind"] == "encoder":
        from trtllm.runtime.sessions.onnxruntime_encoder import OnnxRuntimeEncoder

        return OnnxRuntimeEncoder(engine, threads=threads)
    info = session_info(engine.config, num_blocks, num_host_blocks, tokens_per_block, max_batch_size)
    if is_paged(engine.config):
        from trtllm.runtime.sessions.onnxruntime_session import OnnxRuntimeSession

        return OnnxRuntimeSession(engine, info, threads=threads)
    from trtllm.runtime.sessions.onnxruntime_linear_session import OnnxRuntimeLinearSession

    return OnnxRuntimeLinearSession(engine, info, threads=threads)


def _open_tensorrt(
    engine: Engine,
    num_blocks: int | None,
    num_host_blocks: int,
    tokens_per_block: int | None,
    max_batch_size: int | None,
) -> Any:
    kind = cache_kind(engine.config)
    if engine.config["model"]["kind"] == "encoder" or kind != "gathered":
        raise TargetError(
            f"{engine.path} is a TensorRT plan of a form that has no session: "
            f"{'an encoder' if engine.config['model']['kind'] == 'encoder' else f'its cache is {kind}'}",
            "run the plan with TensorRT itself, or build the model with --target onnxruntime",
        )
    from trtllm.runtime.sessions.tensorrt_session import TensorRTSession

    info = session_info(engine.config, num_blocks, num_host_blocks, tokens_per_block, max_batch_size)
    return TensorRTSession(engine, info)


def cache_kind(config: Mapping[str, Any]) -> str:
    """How an engine's graph takes its cache: "paged", "linear", or "gathered" from a pool that it was built with."""
    return str(config.get("cache", {}).get("kind", "linear"))


def is_paged(config: Mapping[str, Any]) -> bool:
    """Whether an engine's graph takes packed tokens and a cache of blocks; engines that do not say so do not."""
    return cache_kind(config) == "paged"


def session_info(
    config: Mapping[str, Any],
    num_blocks: int | None = None,
    num_host_blocks: int = 0,
    tokens_per_block: int | None = None,
    max_batch_size: int | None = None,
) -> SessionInfo:
    """What a session of an engine with this config.json offers; see `open_session`. Raises UsageError."""
    limits, paged = limits_of(config), is_paged(config)
    rows = max_batch_size or limits.max_batch_size
    if cache_kind(config) == "gathered":
        return _gathered_info(config, limits, rows, num_blocks, num_host_blocks, tokens_per_block)
    if not paged and (rows > limits.max_batch_size or (tokens_per_block or limits.max_seq_len) != limits.max_seq_len):
        raise UsageError(
            f"the cache of this engine is linear: {limits.max_batch_size} slots of {limits.max_seq_len} tokens",
            "build it in float32 at optimization level 2 for a paged cache, or with a larger --max-batch-size",
        )
    size = (tokens_per_block or config["cache"]["tokens_per_block"]) if paged else limits.max_seq_len
    if paged and (size < 1 or size & (size - 1)):
        raise UsageError(f"tokens_per_block is {size}, which is no power of two", "usual are 16, 32, 64 or 128")
    blocks = rows * -(-limits.max_seq_len // size) if num_blocks is None else num_blocks
    if blocks < 1 or num_host_blocks < 0:
        raise UsageError(f"a cache of {blocks} and {num_host_blocks} host blocks cannot be", "give it at least one")
    return SessionInfo(
        vocab_size=limits.vocab_size,
        max_seq_len=limits.max_seq_len,
        max_batch_size=rows,
        max_num_tokens=max(config["build_config"]["max_num_tokens"], rows),
        gathers_all_logits=paged or limits.gathers_context_logits,
        cache=CacheShape(size, blocks, num_host_blocks, cache_groups(config)),
    )


def _gathered_info(
    config: Mapping[str, Any],
    limits: SessionLimits,
    rows: int,
    num_blocks: int | None,
    num_host_blocks: int,
    tokens_per_block: int | None,
) -> SessionInfo:
    """The pool of such an engine is part of its plan; its last block is the session's own."""
    first = next(item for item in config["io"]["inputs"] if item["name"].startswith("past_key."))
    built, _, size, _ = first["shape"]
    blocks = built - 1 if num_blocks is None else num_blocks
    if not (0 < blocks < built and num_host_blocks >= 0 and tokens_per_block in (None, size)):
        raise UsageError(
            f"{blocks} blocks of {tokens_per_block or size} tokens: this engine was built for {built - 1} of {size}",
            "build it with other cache options, or leave them out here",
        )
    return SessionInfo(
        vocab_size=limits.vocab_size,
        max_seq_len=limits.max_seq_len,
        max_batch_size=rows,
        max_num_tokens=max(config["build_config"]["max_num_tokens"], rows),
        gathers_all_logits=limits.gathers_context_logits,
        cache=CacheShape(size, blocks, num_host_blocks, cache_groups(config)),
        num_candidates=_num_candidates(config),
    )


def _num_candidates(config: Mapping[str, Any]) -> int:
    shapes = (item["shape"] for item in config["io"]["outputs"] if item["name"] == "candidate_values")
    return next((int(shape[-1]) for shape in shapes), 0)


def cache_groups(config: Mapping[str, Any]) -> tuple[CacheGroup, ...]:
    """The groups of an engine's cache. An engine from before they were recorded has one, in its inputs' type."""
    record = config.get("cache")
    if record is not None:
        return tuple(CacheGroup(g["window"], len(g["layers"]), g["bytes_per_token"]) for g in record["groups"])
    layers = config["model"]["cache"]
    first = next(item for item in config["io"]["inputs"] if item["name"].startswith("past_key."))
    width = {"FLOAT": 4, "FLOAT16": 2}[first["dtype"]]
    return (CacheGroup(0, len(layers), sum(2 * width * la["num_kv_heads"] * la["head_size"] for la in layers)),)
