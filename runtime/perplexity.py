"""How well an engine predicts a text: perplexity, and its distance from another engine on the same tokens.

Drives a session directly, in steps of bounded size; knows no requests and no sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np

from trtllm.compiler.engine import Engine
from trtllm.errors import UsageError
from trtllm.runtime.session import Session, open_session

STEP_TOKENS = 128
"""Tokens whose logits are held at once: 25 MB for a vocabulary of 49152."""


@dataclass(frozen=True)
class Perplexity:
    """What a text costs an engine, over the tokens that have a predecessor in their window."""

    tokens: int
    """Predicted ones."""
    negative_log_likelihood: float
    """Nats per token."""
    standard_error: float
    """Of negative_log_likelihood, taking tokens for independent."""
    divergence: float | None = None
    """Mean Kullback-Leibler divergence in nats of the engine's distribution from the reference's; None without one."""
    agreement: float | None = None
    """Share of tokens for which both engines find the same one likeliest; None without a reference."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.negative_log_likelihood)


def perplexity(
    engine: Engine,
    tokens: Sequence[int] | np.ndarray,
    context: int = 1024,
    *,
    reference: Engine | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Scores tokens in windows of `context` that do not overlap; each window's first token is not predicted.

    Args:
        tokens: int [T], of the engine's vocabulary; a last window of one token is left out.
        context: tokens of a window, at most the engine's max_seq_len.
        reference: an engine of the same vocabulary, for `divergence` and `agreement`.
        threads: of the kernels; all cores by default.
        progress: told of the tokens scored since the last call.

    Raises:
        UsageError: too few tokens, a context that does not fit, engines of different vocabularies, or an engine
            that gives logits of last tokens only.
    """
    return perplexities([engine], tokens, context, reference=reference, threads=threads, progress=progress)[0]


def perplexities(
    engines: Sequence[Engine],
    tokens: Sequence[int] | np.ndarray,
    context: int = 1024,
    *,
    reference: Engine | None = None,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Perplexity]:
    """`perplexity` of several engines side by side, for which the reference computes once."""
    stream = checked_tokens(tokens, context)
    sessions = [scoring_session(engine, context, threads) for engine in engines]
    other = scoring_session(reference, context, threads) if reference is not None else None
    for session in sessions:
        if other is not None and other.info.vocab_size != session.info.vocab_size:
            raise UsageError(
                f"the reference has {other.info.vocab_size} tokens, the engine {session.info.vocab_size}",
                "compare engines of one model",
            )
    scores = [Score() for _ in sessions]
    step = min(STEP_TOKENS, *(session.info.max_num_tokens for session in [*sessions, other] if session is not None))
    for window in windows(stream, context):
        expected = window_logits(other, window, step) if other is not None else repeat(None)
        start = 0
        for pieces in zip(*(window_logits(session, window, step) for session in sessions), strict=True):
            targets = window[start + 1 : start + 1 + len(pieces[0])]
            wanted = next(expected)
            known = log_softmax(wanted[: len(targets)]) if wanted is not None else None
            for score, logits in zip(scores, pieces, strict=True):
                score.add(logits[: len(targets)], targets, known)
            start += len(pieces[0])
            if progress is not None:
                progress(len(targets))
    return [score.result() for score in scores]


def checked_tokens(tokens: Sequence[int] | np.ndarray, context: int) -> np.ndarray:
    """The tokens as int64 [T]. Raises UsageError when there is nothing to predict."""
    stream = np.asarray(tokens, np.int64)
    if stream.ndim != 1 or len(stream) < 2 or context < 2:
        raise UsageError(
            f"{stream.size} tokens in windows of {context} leave nothing to predict", "give at least two of each"
        )
    return stream


def windows(stream: np.ndarray, context: int) -> Iterator[np.ndarray]:
    """The windows that hold at least one predicted token."""
    for start in range(0, len(stream) - 1, context):
        yield stream[start : start + context]


def scoring_session(engine: Engine, context: int, threads: int | None = None) -> Session:
    """A session that holds one window. Raises UsageError when the engine cannot score it."""
    session: Any = open_session(engine, threads=threads, max_batch_size=1)
    if not hasattr(session, "step"):
        raise UsageError(f"{engine.path} is an encoder", "only decoders predict tokens")
    if not session.info.gathers_all_logits:
        raise UsageError(
            f"{engine.path} gives logits of last tokens only", "build it with --gather-context-logits, or in float32"
        )
    if context > session.info.max_seq_len:
        raise UsageError(
            f"a context of {context} exceeds the {session.info.max_seq_len} tokens of {engine.path}",
            "choose a smaller context, or build the engine with a larger --max-seq-len",
        )
    scoring: Session = session
    return scoring


def window_logits(session: Session, window: np.ndarray, step: int = STEP_TOKENS) -> Iterator[np.ndarray]:
    """Logits float32 [n, V] of the window's tokens, in pieces of `step` that are valid until the next is asked for."""
    size = session.info.cache.tokens_per_block
    table = np.arange(-(-session.info.max_seq_len // size), dtype=np.int32)[None]
    tables = [table for _ in session.info.cache.groups]
    for start in range(0, len(window), step):
        piece = window[start : start + step]
        count = len(piece)
        yield session.step(
            piece,
            np.arange(start, start + count),
            np.asarray([0, count]),
            np.asarray([start]),
            np.arange(count),
            tables,
        )


class Score:
    """Adds up what predictions cost. For logits from elsewhere than an engine too."""

    def __init__(self) -> None:
        self._losses: list[np.ndarray] = []
        self._divergence = 0.0
        self._agreed = 0
        self._compared = False

    def add(self, logits: np.ndarray, targets: np.ndarray, expected: np.ndarray | None = None) -> None:
        """Logits [n, V] whose next tokens are targets [n]; `expected` are the reference's log probabilities there."""
        if not len(targets):
            return
        own = log_softmax(logits)
        self._losses.append(-own[np.arange(len(targets)), targets].astype(np.float64))
        if expected is None:
            return
        self._compared = True
        self._divergence += float(np.einsum("nv,nv->", np.exp(expected), expected - own, dtype=np.float64))
        self._agreed += int(np.count_nonzero(own.argmax(-1) == expected.argmax(-1)))

    def result(self) -> Perplexity:
        losses = np.concatenate(self._losses)
        count = len(losses)
        error = float(losses.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
        compared = (self._divergence / count, self._agreed / count) if self._compared else (None, None)
        return Perplexity(count, float(losses.mean()), error, *compared)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float32, shifted by the maximum."""
    shifted = logits.astype(np.float32) - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float32))
    return shifted
