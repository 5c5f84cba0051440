"""Runs an onnxruntime engine of packed tokens: rows of any length in one step over a cache of blocks, kept in place.

A step copies its few integers into arrays that are bound once; only when the numbers of tokens, rows or logits change
are they bound anew, and the caches never are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trtllm.compiler.engine import Engine
from trtllm.errors import UsageError
from trtllm.runtime.session import SessionInfo, SessionLimits, limits_of
from trtllm.runtime.sessions.block_pool import BlockCopy, BlockPool
from trtllm.runtime.sessions.onnxruntime_library import bind, load


class OnnxRuntimeSession:
    """A decoder engine in the packed form, with its cache."""

    def __init__(self, engine: Engine, info: SessionInfo, *, threads: int | None = None) -> None:
        self.info = info
        self.limits: SessionLimits = limits_of(engine.config)
        self._threads = threads
        self._session: Any = load(engine, threads)
        self._pool = BlockPool(engine.config, info.cache)
        self._binding = self._bound_to_caches(self._session)
        rows, columns = info.max_batch_size, -(-info.max_seq_len // info.cache.tokens_per_block)
        self._tokens = np.zeros(info.max_num_tokens, np.int64)
        self._positions = np.zeros(info.max_num_tokens, np.int64)
        self._row_starts = np.zeros(rows + 1, np.int64)
        self._past_lengths = np.zeros(rows, np.int64)
        self._indices = np.zeros(info.max_num_tokens, np.int64)
        self._tables = [np.zeros((rows, columns), np.int32) for _ in info.cache.groups]
        self._logits = np.zeros((0, info.vocab_size), np.float32)
        self._bound = (0, 0, 0)

    def _bound_to_caches(self, session: Any) -> Any:
        binding = session.io_binding()
        for name, array in self._pool.arrays.items():
            bind(binding.bind_input, name, array)
            bind(binding.bind_output, name.replace("past_", "present_"), array)
        return binding

    def loaded(self, engine: Engine) -> Callable[[], None]:
        """See `trtllm.runtime.session.Session.loaded`."""
        session = load(engine, self._threads)
        binding = self._bound_to_caches(session)

        def take() -> None:
            self._session, self._binding, self._bound = session, binding, (0, 0, 0)

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
        """See `trtllm.runtime.session.Session.step`."""
        if len(copies):
            self._pool.copy(copies)
        count, rows, wanted = len(tokens), len(past_lengths), len(logits_indices)
        if count == 0:
            return self._logits[:0]
        if count > self.info.max_num_tokens or rows > self.info.max_batch_size:
            raise UsageError(
                f"a step of {count} tokens in {rows} rows exceeds the {self.info.max_num_tokens} tokens and "
                f"{self.info.max_batch_size} rows of this session",
                "take several steps, or build the engine with larger limits",
            )
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._row_starts[: rows + 1] = row_starts
        self._past_lengths[:rows] = past_lengths
        if wanted:
            self._indices[:wanted] = logits_indices
        else:
            self._indices[0] = 0  # the head runs on one token, whose logits nobody sees
        for own, table in zip(self._tables, block_tables, strict=True):
            own[:rows, : table.shape[1]] = table[:, : own.shape[1]]
        if self._bound != (count, rows, max(wanted, 1)):
            self._bind(count, rows, max(wanted, 1))
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise UsageError(
                f"the engine refused a step: {str(error).splitlines()[0]}",
                "tokens must be of the vocabulary, and rows must fit the blocks of their tables",
            ) from error
        return self._logits[:wanted]

    def _bind(self, count: int, rows: int, wanted: int) -> None:
        """Binds what changes its extents with the step. Rows of the tables are as wide as a sequence can need."""
        if wanted > len(self._logits):
            self._logits = np.empty((wanted, self.info.vocab_size), np.float32)
        bind_input = self._binding.bind_input
        bind(bind_input, "input_ids", self._tokens, (1, count))
        bind(bind_input, "positions", self._positions, (1, count))
        bind(bind_input, "row_starts", self._row_starts, (rows + 1,))
        bind(bind_input, "past_lengths", self._past_lengths, (rows,))
        bind(bind_input, "logits_indices", self._indices, (wanted,))
        for index, table in enumerate(self._tables):
            bind(bind_input, f"block_table.{index}", table, (rows, table.shape[1]))
        bind(self._binding.bind_output, "logits", self._logits, (1, wanted, self.info.vocab_size))
        self._bound = (count, rows, wanted)
