"""Runs an onnxruntime engine of padded rows: every row has a slot, a cache of its own, and a block is a whole slot.

Its graph takes one row of several tokens, or one token each of slots that follow each other. A step is shared out over
such runs, so that slots which are no part of it are never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtllm.compiler.engine import Engine
from trtllm.errors import UsageError
from trtllm.runtime.session import SessionInfo, SessionLimits, limits_of
from trtllm.runtime.sessions.block_pool import BlockCopy, BlockPool
from trtllm.runtime.sessions.onnxruntime_library import bind, load


@dataclass(eq=False)
class _Binding:
    """A binding and the arrays it reads and writes, for one number of rows and tokens."""

    binding: Any
    tokens: np.ndarray
    past_lengths: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class _Row:
    """A row of a step: where its tokens lie, and its slot."""

    slot: int
    start: int
    count: int
    past: int


class OnnxRuntimeLinearSession:
    """A decoder engine in the padded form, with its cache of slots."""

    def __init__(self, engine: Engine, info: SessionInfo, *, threads: int | None = None) -> None:
        self.info = info
        self.limits: SessionLimits = limits_of(engine.config)
        self._threads = threads
        self._session: Any = load(engine, threads)
        self._pool = BlockPool(engine.config, info.cache)
        self._single: dict[tuple[int, int], _Binding] = {}
        self._logits = np.zeros((0, info.vocab_size), np.float32)

    def loaded(self, engine: Engine) -> Callable[[], None]:
        """See `trtllm.runtime.session.Session.loaded`."""
        session = load(engine, self._threads)

        def take() -> None:
            self._session, self._single = session, {}

        return take

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        row_starts: np.ndarray,
        past_lengths: np.ndarray,
        logits_indices: np.ndarray,
        block_tables: Sequence[np.ndarray],
        copies: Sequence[BlockCopy] = (),
    ) -> np.ndarray:
        """See `trtllm.runtime.session.Session.step`. Positions follow from the past lengths."""
        if len(copies):
            self._pool.copy(copies)
        rows = [
            _Row(int(table[0]), int(start), int(end - start), int(past))
            for table, start, end, past in zip(
                block_tables[0] if len(past_lengths) else (), row_starts[:-1], row_starts[1:], past_lengths, strict=True
            )
            if end > start
        ]
        self._check(rows, logits_indices)
        if len(logits_indices) > len(self._logits):
            self._logits = np.empty((len(logits_indices), self.info.vocab_size), np.float32)
        for run in _runs(rows):
            self._run(run, tokens, logits_indices)
        return self._logits[: len(logits_indices)]

    def _check(self, rows: list[_Row], logits_indices: np.ndarray) -> None:
        for row in rows:
            if not 0 <= row.slot < self.info.cache.num_blocks or row.past + row.count > self.info.max_seq_len:
                raise UsageError(
                    f"{row.past} + {row.count} tokens in slot {row.slot} do not fit the cache",
                    f"it has {self.info.cache.num_blocks} slots of {self.info.max_seq_len} tokens",
                )
        if len({row.slot for row in rows}) < len(rows):
            raise UsageError("two rows of a step have the same slots", "give each sequence a slot of its own")
        lasts = {row.start + row.count - 1 for row in rows}
        if not self.info.gathers_all_logits and not lasts.issuperset(logits_indices.tolist()):
            raise UsageError(
                "this engine gives logits of each row's last token only", "build it with --gather-context-logits"
            )

    def _run(self, run: list[_Row], tokens: np.ndarray, logits_indices: np.ndarray) -> None:
        count = run[0].count
        step = self._binding_for(run[0].slot, len(run), count)
        for index, row in enumerate(run):
            step.tokens[index] = tokens[row.start : row.start + count]
            step.past_lengths[index] = row.past
        self._session.run_with_iobinding(step.binding)
        gathered = step.logits.shape[1]
        for index, row in enumerate(run):
            first = row.start + count - gathered
            places = np.flatnonzero((logits_indices >= first) & (logits_indices < row.start + count))
            self._logits[places] = step.logits[index, logits_indices[places] - first]

    def _binding_for(self, slot: int, rows: int, count: int) -> _Binding:
        if count > 1:
            return self._bind(slot, rows, count)
        if (slot, rows) not in self._single:
            self._single[slot, rows] = self._bind(slot, rows, 1)
        return self._single[slot, rows]

    def _bind(self, slot: int, rows: int, count: int) -> _Binding:
        gathered = count if self.info.gathers_all_logits else 1
        step = _Binding(
            self._session.io_binding(),
            np.zeros((rows, count), np.int64),
            np.zeros(rows, np.int64),
            np.full(rows, count, np.int64),
            np.empty((rows, gathered, self.info.vocab_size), np.float32),
        )
        bind_input, bind_output = step.binding.bind_input, step.binding.bind_output
        bind(bind_input, "input_ids", step.tokens)
        bind(bind_input, "past_lengths", step.past_lengths)
        bind(bind_input, "lengths", step.lengths)
        bind(bind_output, "logits", step.logits)
        for name, cache in self._pool.arrays.items():
            view = cache[slot : slot + rows]
            bind(bind_input, name, view)
            bind(bind_output, name.replace("past_", "present_"), view)
        return step


def _runs(rows: list[_Row]) -> Iterator[list[_Row]]:
    """Rows of several tokens by themselves; single tokens with those of the slots that follow."""
    yield from ([row] for row in rows if row.count > 1)
    run: list[_Row] = []
    for row in sorted((row for row in rows if row.count == 1), key=lambda row: row.slot):
        if run and row.slot != run[-1].slot + 1:
            yield run
            run = []
        run.append(row)
    if run:
        yield run
