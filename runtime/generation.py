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


def generate(session: Session, sequences: list[Sequence], stops: StopCheck) -> None:
    """Generates for every sequence, at most `max_batch_size` at a time.

    `stops` looks at a sequence after each token and may finish it (stop strings).
    """
    waiting = deque(sequences)
    slots: list[Sequence | None] = [None] * session.limits.max_batch_size
    samplers = {id(sequence): Sampler(sequence.params) for sequence in sequences}
    while waiting or any(slots):
        for slot, occupant in enumerate(slots):
            if occupant is None and waiting:
                slots[slot] = _prefill(session, waiting.popleft(), slot, samplers, stops)
        _decode(session, slots, samplers, stops)


def _prefill(
    session: Session, sequence: Sequence, slot: int, samplers: dict[int, Sampler], stops: StopCheck
) -> Sequence | None:
    """Runs the prompt in one step and picks the first token; None when that one already ends it."""
    sequence.slot = slot
    logits = session.step(slot, np.asarray([sequence.prompt], np.int64), np.zeros(1, np.int64))
    _accept(sequence, samplers[id(sequence)].pick(logits[0, -1]), session, stops)
    return None if sequence.is_finished else sequence


def _decode(session: Session, slots: list[Sequence | None], samplers: dict[int, Sampler], stops: StopCheck) -> None:
    """One token for every occupied slot. Free slots between them run along unused, at their first cache row."""
    occupied = [slot for slot, sequence in enumerate(slots) if sequence is not None]
    if not occupied:
        return
    first, last = occupied[0], occupied[-1]
    tokens = np.zeros((last - first + 1, 1), np.int64)
    past = np.zeros(last - first + 1, np.int64)
    for slot in occupied:
        sequence = slots[slot]
        assert sequence is not None
        tokens[slot - first, 0] = sequence.tokens[-1]
        past[slot - first] = sequence.cached
    logits = session.step(first, tokens, past)
    for slot in occupied:
        sequence = slots[slot]
        assert sequence is not None
        _accept(sequence, samplers[id(sequence)].pick(logits[slot - first, -1]), session, stops)
        if sequence.is_finished:
            slots[slot] = None


def _accept(sequence: Sequence, token: int, session: Session, stops: StopCheck) -> None:
    """Appends a token and decides whether the sequence ends. An end token is not part of the output."""
    if token in sequence.end_ids:
        sequence.finish_reason, sequence.stop_reason = "stop", token
        return
    sequence.tokens.append(token)
    full = len(sequence.prompt) + len(sequence.tokens) >= session.limits.max_seq_len
    if stops(sequence):
        sequence.finish_reason = "stop"
    elif len(sequence.tokens) >= sequence.params.max_tokens or full:
        sequence.finish_reason = "length"
