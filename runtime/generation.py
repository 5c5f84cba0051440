"""The loop that turns prompts into tokens: requests take a free slot, are prefilled alone, and decode together.

It is deliberately small; scheduling, cache sharing and streaming belong to the executor.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from trtllm.runtime.sampling import Sampler, SamplingParams
from trtllm.runtime.session import Session


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated for it."""

    prompt: list[int]
    params: SamplingParams
    end_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    slot: int = -1

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the newest."""
        return len(self.prompt) + len(self.tokens) - 1


StopCheck = Callable[[Sequence], bool]


class Slots:
    """Which sequence has which part of the cache: slot i owns the blocks i * n .. (i + 1) * n - 1 of every group."""

    def __init__(self, session: Session) -> None:
        info = session.info
        self.session = session
        self._columns = -(-info.max_seq_len // info.cache.tokens_per_block)
        count = min(info.max_batch_size, info.cache.num_blocks // self._columns)
        self.occupants: list[Sequence | None] = [None] * count

    def step(self, rows: list[Sequence], tokens: list[list[int]], past: list[int]) -> np.ndarray:
        """Runs each sequence's new tokens after `past` cached ones: logits [rows, V] of the last ones."""
        counts = [len(row) for row in tokens]
        ends = np.cumsum(counts)
        first = np.array([sequence.slot for sequence in rows])[:, None] * self._columns
        table = (first + np.arange(self._columns)).astype(np.int32)
        return self.session.step(
            np.concatenate([np.asarray(row, np.int64) for row in tokens]),
            np.concatenate([np.arange(start, start + count) for start, count in zip(past, counts, strict=True)]),
            np.concatenate([[0], ends]),
            np.asarray(past, np.int64),
            ends - 1,
            [table] * len(self.session.info.cache.groups),
        )


def generate(session: Session, sequences: list[Sequence], stops: StopCheck) -> None:
    """Generates for every sequence, as many at a time as have room.

    `stops` looks at a sequence after each token and may finish it (stop strings).
    """
    waiting = deque(sequences)
    slots = Slots(session)
    samplers = {id(sequence): Sampler(sequence.params) for sequence in sequences}
    while waiting or any(slots.occupants):
        for slot, occupant in enumerate(slots.occupants):
            if occupant is None and waiting:
                slots.occupants[slot] = _prefill(slots, waiting.popleft(), slot, samplers, stops)
        _decode(slots, samplers, stops)


def _prefill(
    slots: Slots, sequence: Sequence, slot: int, samplers: dict[int, Sampler], stops: StopCheck
) -> Sequence | None:
    """Runs the prompt in as few steps as it takes and picks the first token; None when that one already ends it."""
    sequence.slot = slot
    most = slots.session.info.max_num_tokens
    for start in range(0, len(sequence.prompt), most):
        logits = slots.step([sequence], [sequence.prompt[start : start + most]], [start])
    _accept(sequence, samplers[id(sequence)].pick(logits[0]), slots.session, stops)
    return None if sequence.is_finished else sequence


def _decode(slots: Slots, samplers: dict[int, Sampler], stops: StopCheck) -> None:
    """One token for every occupied slot."""
    rows = [sequence for sequence in slots.occupants if sequence is not None]
    if not rows:
        return
    logits = slots.step(rows, [[row.tokens[-1]] for row in rows], [row.cached for row in rows])
    for index, sequence in enumerate(rows):
        _accept(sequence, samplers[id(sequence)].pick(logits[index]), slots.session, stops)
        if sequence.is_finished:
            slots.occupants[sequence.slot] = None


def _accept(sequence: Sequence, token: int, session: Session, stops: StopCheck) -> None:
    """Appends a token and decides whether the sequence ends. An end token is not part of the output."""
    if token in sequence.end_ids:
        sequence.finish_reason, sequence.stop_reason = "stop", token
        return
    sequence.tokens.append(token)
    full = len(sequence.prompt) + len(sequence.tokens) >= session.info.max_seq_len
    if stops(sequence):
        sequence.finish_reason = "stop"
    elif len(sequence.tokens) >= sequence.params.max_tokens or full:
        sequence.finish_reason = "length"
