"""Runs a TensorRT engine whose cache is gathered: tables name the blocks, new keys and values leave the plan.

Every profile of such a plan has one shape. A step is shared out over them: rows of one token side by side in the
smallest batch that holds them, rows of several one by one in chunks. After each run a kernel writes the new keys and
values to their blocks, so that only integers go to the GPU and only the logits that are asked for come back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from trtllm.compiler.engine import Engine
from trtllm.errors import TargetError, UsageError
from trtllm.runtime.cuda.driver import Device, Memory, PinnedMemory, Stream, open_device
from trtllm.runtime.session import SessionInfo, SessionLimits, limits_of
from trtllm.runtime.sessions.block_pool import BlockCopy
from trtllm.runtime.sessions.device_pool import DevicePool, aligned
from trtllm.runtime.sessions.tensorrt_library import Plan
from trtllm.runtime.sessions.tensorrt_program import (
    Arena,
    Extents,
    Program,
    StepInputs,
    Workspace,
    extents_of,
    input_layout,
    outputs_nbytes,
)

_ARENA_BYTES = 4 << 20
"""Of pinned memory for the integers of a step, and for its candidates; one that needs more waits in between."""


@dataclass(frozen=True)
class _Found:
    """Candidates of one run on their way to the host: rows `sources` of the run are rows `places` of the step."""

    program: Program
    offset: int
    sources: np.ndarray
    places: np.ndarray


class TensorRTSession:
    """A decoder engine for an NVIDIA GPU, with its cache."""

    def __init__(self, engine: Engine, info: SessionInfo, *, device: Device | None = None) -> None:
        """Raises TargetError when this machine cannot run the engine, ResourceError when the GPU has no room."""
        self.info = info
        self.limits: SessionLimits = limits_of(engine.config)
        self._device = device or open_device()
        self._device.make_current()
        self._stream: Stream = self._device.stream()
        plan = Plan(engine, self._device)
        self._pool = DevicePool(engine.config, info.cache, plan.tensors, self._device, self._stream)
        self._programs = Programs(plan, self._pool, info, self._device, self._stream)
        self._arena = Arena(self._device, max(_ARENA_BYTES, self._programs.inputs_nbytes))
        self._found_arena = Arena(self._device, max(_ARENA_BYTES, self._programs.candidates_nbytes))
        self._found: list[_Found] = []
        self._best = (np.zeros((0, 1), np.float32), np.zeros((0, 1), np.int32), np.zeros(0, np.float32))
        self._num_wanted = 0
        self._whole = np.zeros(0, bool)
        self._row_addresses = np.zeros(0, np.int64)
        self._in_outputs = np.zeros(0, np.int64)
        self._kept: Memory = self._device.allocate(0)
        self._num_kept = 0
        self._host_logits: PinnedMemory = self._device.pinned(0)
        self._logits = np.zeros((0, info.vocab_size), np.float32)
        self._places = np.zeros(info.max_num_tokens, np.int64)

    @property
    def notes(self) -> list[str]:
        """What runs other than it was meant to: shapes that the library could not put into a CUDA graph, and why."""
        return self._programs.notes

    def loaded(self, engine: Engine) -> Callable[[], None]:
        """See `trtllm.runtime.session.Session.loaded`. Until it is taken the GPU holds both engines."""
        self._device.make_current()
        stream = self._device.stream()
        programs = Programs(Plan(engine, self._device), self._pool, self.info, self._device, stream)
        arenas = len(self._arena.memory.bytes), len(self._found_arena.memory.bytes)
        if programs.inputs_nbytes > arenas[0] or programs.candidates_nbytes > arenas[1]:
            raise TargetError(f"{engine.path} is planned for other shapes", "refit the engine that is running")

        def take() -> None:
            self._programs = programs

        return take

    def warm_up(self) -> None:
        """Runs every shape twice, on no sequence's tokens, so that later steps find all graphs made."""
        self._device.make_current()
        for program in self._programs.all:
            for _ in range(2):
                self._queue(program, self._fill_nothing)
        self._wait()

    def step(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        row_starts: np.ndarray,
        past_lengths: np.ndarray,
        logits_indices: np.ndarray,
        block_tables: Sequence[np.ndarray],
        copies: Sequence[BlockCopy] = (),
        whole: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `trtllm.runtime.session.CandidateSession.step`. Positions follow from the past lengths."""
        self._device.make_current()
        wanted = len(logits_indices)
        if len(tokens):
            self._check(tokens, row_starts, past_lengths, logits_indices, block_tables)
            self._prepare(wanted, whole)
        if len(copies):
            self._pool.copy(copies, self._stream)
        if len(tokens):
            places = self._places[: len(tokens)]
            places[:] = -1
            places[logits_indices] = np.arange(wanted)
            self._queue_rows(tokens, row_starts, past_lengths, places, block_tables)
        self._wait()
        self._collect()
        return self._logits[:wanted]

    def candidates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `trtllm.runtime.session.CandidateSession.candidates`."""
        return self._best

    def complete(self, index: int) -> None:
        """See `trtllm.runtime.session.CandidateSession.complete`."""
        nbytes = 4 * self.info.vocab_size
        target, source = self._host_logits.address + index * nbytes, int(self._row_addresses[index])
        self._device.to_host(target, source, nbytes, self._stream)
        self._wait()

    def _queue_rows(
        self,
        tokens: np.ndarray,
        row_starts: np.ndarray,
        past_lengths: np.ndarray,
        places: np.ndarray,
        block_tables: Sequence[np.ndarray],
    ) -> None:
        starts, counts = row_starts[:-1], np.diff(row_starts)
        for row in np.flatnonzero(counts > 1):
            start, past = int(starts[row]), int(past_lengths[row])
            tables = [table[row] for table in block_tables]
            self._queue_chunks(tokens[start : start + counts[row]], past, tables, places[start : start + counts[row]])
        single = np.flatnonzero(counts == 1)
        most = self._programs.most_rows
        for first in range(0, len(single), most):
            rows = single[first : first + most]
            at = starts[rows]
            self._queue_singles(tokens[at], past_lengths[rows], [table[rows] for table in block_tables], places[at])

    def _queue_singles(
        self, tokens: np.ndarray, past: np.ndarray, tables: list[np.ndarray], places: np.ndarray
    ) -> None:
        """One new token of each row."""
        count, size = len(tokens), self.info.cache.tokens_per_block
        program = self._programs.for_rows(count, -(-int(past.max()) // size))

        def fill(inputs: StepInputs) -> None:
            inputs.tokens[:count, 0] = tokens
            inputs.tokens[count:] = 0
            inputs.past_lengths[:count] = past
            inputs.past_lengths[count:] = 0
            inputs.lengths[:] = 1
            for group, table in enumerate(tables):
                self._fill_table(inputs.tables[group], table, past, group)
                inputs.blocks[group, :count, 0] = np.take_along_axis(table, (past // size)[:, None], 1)[:, 0]
                inputs.blocks[group, :count, 1:] = self._pool.nowhere
                inputs.blocks[group, count:] = self._pool.nowhere

        self._queue(program, fill)
        self._fetch(program, np.arange(count), places)

    def _queue_chunks(self, tokens: np.ndarray, past: int, tables: list[np.ndarray], places: np.ndarray) -> None:
        """Several new tokens of one row."""
        size = self.info.cache.tokens_per_block
        while len(tokens):
            program = self._programs.for_chunk(len(tokens), -(-past // size))
            count = min(len(tokens), program.extents.tokens)
            self._queue_chunk(program, tokens[:count], past, tables)
            if program.logits.stride:
                self._fetch(program, np.arange(count), places[:count])
            else:
                self._fetch(program, np.zeros(1, np.int64), places[count - 1 : count])
            tokens, places, past = tokens[count:], places[count:], past + count

    def _queue_chunk(self, program: Program, tokens: np.ndarray, past: int, tables: list[np.ndarray]) -> None:
        count, size = len(tokens), self.info.cache.tokens_per_block
        first, end = past // size, -(-(past + count) // size)

        def fill(inputs: StepInputs) -> None:
            inputs.tokens[0, :count] = tokens
            inputs.tokens[0, count:] = 0
            inputs.past_lengths[:] = past
            inputs.lengths[:] = count
            for group, table in enumerate(tables):
                self._fill_table(inputs.tables[group], table[None], np.array([past]), group)
                inputs.blocks[group, 0, : end - first] = table[first:end]
                inputs.blocks[group, 0, end - first :] = self._pool.nowhere

        self._queue(program, fill)

    def _fill_table(self, target: np.ndarray, table: np.ndarray, past: np.ndarray, group: int) -> None:
        """Blocks of tokens that the cache holds and a window shows; elsewhere one that is all zeros."""
        cache = self.info.cache
        columns = min(target.shape[1], table.shape[1])
        begins = np.arange(columns) * cache.tokens_per_block
        shown = begins < past[:, None]
        if window := cache.groups[group].window:
            shown &= begins + cache.tokens_per_block > past[:, None] + 1 - window
        target[:] = self._pool.nowhere
        np.copyto(target[: len(table), :columns], table[:, :columns], where=shown)

    def _fill_nothing(self, inputs: StepInputs) -> None:
        """Rows that nobody has: one token each, which goes nowhere."""
        inputs.tokens[:] = 0
        inputs.past_lengths[:] = 0
        inputs.lengths[:] = 1
        inputs.blocks[:] = self._pool.nowhere
        for table in inputs.tables:
            table[:] = self._pool.nowhere

    def _queue(self, program: Program, fill: Callable[[StepInputs], None]) -> None:
        if len(self._in_outputs):
            self._keep_rows()
        offset = self._arena.take(program.layout.nbytes)
        if offset is None:
            self._wait()
            offset = self._arena.take(program.layout.nbytes)
        assert offset is not None, "the arena holds the inputs of any one program"
        piece = self._arena.memory.bytes[offset : offset + program.layout.nbytes]
        fill(StepInputs(piece, program.layout, program.extents))
        program.queue(self._arena.memory.address + offset, self._stream)

    def _fetch(self, program: Program, sources: np.ndarray, places: np.ndarray) -> None:
        """Copies logits of the plan's rows `sources` to the result's rows `places`, where those are not -1."""
        kept = places >= 0
        sources, places = sources[kept], places[kept]
        if not len(places):
            return
        nbytes = program.logits.row_nbytes
        if self.info.num_candidates and not (whole := self._whole[places]).all():
            self._fetch_candidates(program, sources, places)
            self._row_addresses[places] = program.logits.address + sources * nbytes
            self._in_outputs = places[~whole]
            if len(self._in_outputs) == len(places):
                return
            sources, places = sources[whole], places[whole]
        breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(places) != 1)) + 1
        for first, end in zip([0, *breaks], [*breaks, len(places)], strict=True):
            if end > first:
                target = self._host_logits.address + int(places[first]) * nbytes
                source = program.logits.address + int(sources[first]) * nbytes
                self._device.to_host(target, source, int(end - first) * nbytes, self._stream)

    def _fetch_candidates(self, program: Program, sources: np.ndarray, places: np.ndarray) -> None:
        layout = program.candidates
        assert layout is not None
        offset = self._found_arena.take(layout.nbytes)
        if offset is None:
            self._wait()
            self._collect()
            offset = self._found_arena.take(layout.nbytes)
        assert offset is not None, "the arena holds the candidates of any one program"
        self._device.to_host(self._found_arena.memory.address + offset, layout.address, layout.nbytes, self._stream)
        self._found.append(_Found(program, offset, sources, places))

    def _collect(self) -> None:
        """Brings the candidates that have come into the order of the step's rows."""
        found, self._found = self._found, []
        self._found_arena.reset()
        for item in found:
            layout = item.program.candidates
            assert layout is not None
            views = layout.views(self._found_arena.memory.bytes[item.offset : item.offset + layout.nbytes])
            if len(item.places) == self._num_wanted and np.array_equal(item.places, item.sources):
                values, tokens, sums = views
                self._best = (values[: self._num_wanted], tokens[: self._num_wanted], sums[: self._num_wanted])
                return
            for target, view in zip(self._best, views, strict=True):
                target[item.places] = view[item.sources]

    def _keep_rows(self) -> None:
        """Takes rows that somebody may ask for out of the outputs, before the next run writes there."""
        nbytes = 4 * self.info.vocab_size
        for place in self._in_outputs:
            target = self._kept.address + self._num_kept * nbytes
            self._device.on_device(target, int(self._row_addresses[place]), nbytes, self._stream)
            self._row_addresses[place] = target
            self._num_kept += 1
        self._in_outputs = self._in_outputs[:0]

    def _wait(self) -> None:
        self._device.synchronize(self._stream)
        self._arena.reset()

    def _prepare(self, wanted: int, whole: np.ndarray | None) -> None:
        """Room for the results of a step, which waits for nothing."""
        self._num_wanted, self._num_kept = wanted, 0
        self._in_outputs = self._in_outputs[:0]
        count = self.info.num_candidates
        if count:
            self._whole = np.ones(wanted, bool) if whole is None or not len(whole) else np.asarray(whole) != 0
            self._row_addresses = np.zeros(wanted, np.int64)
            shape = (wanted, count)
            self._best = (np.empty(shape, np.float32), np.empty(shape, np.int32), np.empty(wanted, np.float32))
            hidden = 4 * self.info.vocab_size * int(np.count_nonzero(~self._whole))
            if hidden > self._kept.nbytes:
                self._kept = self._device.allocate(hidden)
        if wanted <= len(self._logits):
            return
        rows = max(wanted, 2 * len(self._logits))
        self._host_logits = self._device.pinned(rows * self.info.vocab_size * 4)
        self._logits = self._host_logits.bytes.view(np.float32).reshape(rows, self.info.vocab_size)

    def _check(
        self,
        tokens: np.ndarray,
        row_starts: np.ndarray,
        past_lengths: np.ndarray,
        logits_indices: np.ndarray,
        block_tables: Sequence[np.ndarray],
    ) -> None:
        info, rows = self.info, len(past_lengths)
        if len(tokens) > info.max_num_tokens or rows > info.max_batch_size:
            raise UsageError(
                f"a step of {len(tokens)} tokens in {rows} rows exceeds the {info.max_num_tokens} tokens and "
                f"{info.max_batch_size} rows of this session",
                "take several steps, or build the engine with larger limits",
            )
        ends = past_lengths + np.diff(row_starts)
        covered = min(table.shape[1] for table in block_tables) * info.cache.tokens_per_block
        if ends.max() > min(info.max_seq_len, covered):
            raise UsageError(
                f"a row of {int(ends.max())} tokens does not fit the {min(info.max_seq_len, covered)} of its table",
                f"sequences have at most {info.max_seq_len} tokens",
            )
        if tokens.min() < 0 or tokens.max() >= info.vocab_size:
            raise UsageError(
                f"a step holds tokens from {int(tokens.min())} to {int(tokens.max())}, outside the vocabulary of "
                f"{info.vocab_size}",
                "use this engine's tokenizer",
            )
        if any(table.min() < 0 or table.max() >= info.cache.num_blocks for table in block_tables):
            raise UsageError(
                "a block table names blocks that do not fit the cache", f"it has {info.cache.num_blocks} blocks"
            )
        lasts = row_starts[1:] - 1
        if not info.gathers_all_logits and not np.isin(logits_indices, lasts).all():
            raise UsageError(
                "this engine gives logits of each row's last token only", "build it with --gather-context-logits"
            )


class Programs:
    """All programs of one plan, and which of them takes what."""

    def __init__(self, plan: Plan, pool: DevicePool, info: SessionInfo, device: Device, stream: Stream) -> None:
        shapes = extents_of(plan, info.cache.tokens_per_block)
        self.inputs_nbytes = max(input_layout(plan, shape).nbytes for shape in shapes)
        workspace = Workspace(device, plan, self.inputs_nbytes, max(outputs_nbytes(plan, shape) for shape in shapes))
        self.all = [Program(plan, shape, pool, workspace, device, stream) for shape in shapes]
        device.synchronize(stream)
        if self.all[0].logits.row_nbytes != 4 * info.vocab_size:
            raise TargetError("the plan's logits are no rows of float32 over the vocabulary", "build the engine again")
        layouts = [program.candidates for program in self.all if program.candidates is not None]
        self.candidates_nbytes = max((aligned(layout.nbytes) for layout in layouts), default=0)
        if info.num_candidates != (layouts[0].count if layouts else 0):
            raise TargetError("the plan's candidates are not those of config.json", "build the engine again")
        self._singles = sorted((p for p in self.all if p.extents.tokens == 1), key=_cost)
        self._chunks = sorted((p for p in self.all if p.extents.tokens > 1 and p.extents.rows == 1), key=_cost)
        longest = -(-(info.max_seq_len - 1) // info.cache.tokens_per_block)
        for kind, programs in (("single tokens", self._singles), ("prompts", self._chunks)):
            if max((program.extents.columns for program in programs), default=-1) < longest:
                raise TargetError(
                    f"the plan has no profile for {kind} of sequences of {info.max_seq_len} tokens",
                    "build the engine again, or give a smaller max_seq_len",
                )
        self.most_rows = max(p.extents.rows for p in self._singles if p.extents.columns >= longest)
        self._told: set[int] = set()
        self._known: dict[tuple[int, int], Program] = {}

    @property
    def notes(self) -> list[str]:
        return [f"no CUDA graph of {_words(program.extents)}: {program.note}" for program in self.all if program.note]

    def for_rows(self, rows: int, columns: int) -> Program:
        """The cheapest for rows of one new token, whose tables have so many columns."""
        found = self._known.get((rows, columns))
        if found is None:
            fits = (p for p in self._singles if p.extents.rows >= rows and p.extents.columns >= columns)
            found = self._known[rows, columns] = next(fits)
        self._tell(found)
        return found

    def for_chunk(self, tokens: int, columns: int) -> Program:
        """The cheapest for so many new tokens of one row; the largest there is when none holds them all."""
        fitting = [p for p in self._chunks if p.extents.columns >= columns]
        found = next((p for p in fitting if p.extents.tokens >= tokens), None)
        if found is None:
            found = max(fitting, key=lambda p: (p.extents.tokens, -p.extents.columns))
        self._tell(found)
        return found

    def _tell(self, program: Program) -> None:
        if program.note and program.extents.profile not in self._told:
            self._told.add(program.extents.profile)
            warnings.warn(f"no CUDA graph of {_words(program.extents)}: {program.note}", RuntimeWarning, stacklevel=2)


def _cost(program: Program) -> tuple[int, int, int]:
    return program.extents.rows, program.extents.tokens, program.extents.columns


def _words(extents: Extents) -> str:
    return f"{extents.rows} x {extents.tokens} tokens over {extents.columns} blocks"
