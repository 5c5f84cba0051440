"""One profile of a plan made ready to run: where its inputs and outputs lie, its context, and its CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtllm.errors import TrtllmError
from trtllm.runtime.cuda.cache_kernels import TokenWrite
from trtllm.runtime.cuda.driver import Device, Memory, PinnedMemory, Stream
from trtllm.runtime.sessions.device_pool import DevicePool, aligned
from trtllm.runtime.sessions.tensorrt_library import Context, Plan, TensorInfo

CANDIDATES = ("candidate_values", "candidate_indices", "log_sum_exp")


@dataclass(frozen=True)
class Extents:
    """The one shape that a profile is planned for."""

    profile: int
    rows: int
    tokens: int
    """New ones of each row."""
    columns: int
    """Of the block tables, which cover what the cache holds already."""
    written: int
    """Blocks that the new tokens of one row can touch."""


@dataclass(frozen=True)
class InputLayout:
    """Where the integers of a step lie, in bytes from the first: one copy brings them all to the GPU."""

    tokens: int
    past_lengths: int
    lengths: int
    tables: tuple[int, ...]
    blocks: int
    nbytes: int


class StepInputs:
    """The integers of one run as arrays in pinned memory."""

    def __init__(self, memory: np.ndarray, layout: InputLayout, extents: Extents) -> None:
        def part(offset: int, *shape: int) -> np.ndarray:
            size = 4 * int(np.prod(shape))
            return memory[offset : offset + size].view(np.int32).reshape(shape)

        rows = extents.rows
        self.tokens = part(layout.tokens, rows, extents.tokens)
        self.past_lengths = part(layout.past_lengths, rows)
        self.lengths = part(layout.lengths, rows)
        self.tables = [part(offset, rows, extents.columns) for offset in layout.tables]
        self.blocks = part(layout.blocks, len(layout.tables), rows, extents.written)


@dataclass(frozen=True)
class LogitsLayout:
    """Logits of the plan as rows of float32: row r's token t is row `r * stride + t`, or `r` with its last one only."""

    address: int
    row_nbytes: int
    stride: int


@dataclass(frozen=True)
class CandidatesLayout:
    """The best logits of a run in one piece: values [rows, count], tokens [rows, count], log_sum_exp [rows]."""

    address: int
    nbytes: int
    offsets: tuple[int, int, int]
    rows: int
    count: int

    def views(self, memory: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three in a copy of the piece on the host."""
        size, rows = 4 * self.rows * self.count, 4 * self.rows
        values, tokens, sums = (
            memory[offset : offset + nbytes] for offset, nbytes in zip(self.offsets, (size, size, rows), strict=True)
        )
        shape = (self.rows, self.count)
        return values.view(np.float32).reshape(shape), tokens.view(np.int32).reshape(shape), sums.view(np.float32)


class Arena:
    """Pinned memory that is handed out piece by piece, until the stream has been waited for."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.memory: PinnedMemory = device.pinned(nbytes)
        self._used = 0

    def take(self, nbytes: int) -> int | None:
        """The offset of a fresh piece, None when there is none."""
        offset, end = self._used, self._used + aligned(nbytes)
        if end > len(self.memory.bytes):
            return None
        self._used = end
        return offset

    def reset(self) -> None:
        self._used = 0


class Workspace:
    """What all programs of a plan share, because they run one after the other: inputs, outputs and scratch memory."""

    def __init__(self, device: Device, plan: Plan, inputs_nbytes: int, outputs_nbytes: int) -> None:
        self.inputs: Memory = device.allocate(inputs_nbytes)
        self.outputs: Memory = device.allocate(outputs_nbytes)
        self.scratch: Memory = device.allocate(plan.scratch_nbytes)


class Program:
    """A context whose inputs and outputs are bound for good. A run is one copy, then the context and one kernel, which
    from the second run on are a CUDA graph."""

    def __init__(
        self, plan: Plan, extents: Extents, pool: DevicePool, workspace: Workspace, device: Device, stream: Stream
    ) -> None:
        self.extents = extents
        self.layout = input_layout(plan, extents)
        self.note = ""
        """Why runs go without a graph; empty when they do not."""
        self._device, self._kernels, self._workspace = device, pool.kernels, workspace
        self._context: Context = plan.context(extents.profile, workspace.scratch.address, stream)
        base = workspace.inputs.address
        for name, offset, shape in _inputs(plan, extents, self.layout):
            self._context.set_input(name, shape, base + offset)
        for name, address in pool.addresses.items():
            self._context.set_input(name, plan.tensors[name].shape, address)
        self._outputs = output_offsets(plan, extents)
        for name, offset in self._outputs.items():
            self._context.set_address(name, workspace.outputs.address + offset)
        sources = [self.output(name.replace("past_", "present_")) for name in pool.names]
        addresses = (base + self.layout.past_lengths, base + self.layout.lengths, base + self.layout.blocks)
        shape = (extents.rows, extents.tokens, extents.written)
        self._write: TokenWrite = pool.kernels.prepared_write(sources, addresses, shape, pool.nowhere, stream)
        info = plan.tensors["logits"]
        self.logits = LogitsLayout(
            self.output("logits"), info.shape[-1] * info.item_nbytes, extents.tokens if len(info.shape) == 3 else 0
        )
        self.candidates = self._candidates_layout(plan) if CANDIDATES[0] in plan.tensors else None
        self._graph: Any = None
        self._num_runs = 0

    def _candidates_layout(self, plan: Plan) -> CandidatesLayout:
        rows, count = self.extents.rows, plan.tensors[CANDIDATES[0]].shape[1]
        first, second, third = (self._outputs[name] for name in CANDIDATES)
        return CandidatesLayout(
            self.output(CANDIDATES[0]), third + 4 * rows - first, (0, second - first, third - first), rows, count
        )

    def output(self, name: str) -> int:
        """The address of an output."""
        return self._workspace.outputs.address + self._outputs[name]

    def queue(self, inputs: int, stream: Stream) -> None:
        """Queues a run on the inputs at an address of the host, which must stay until the stream is waited for."""
        self._device.to_device(self._workspace.inputs.address, inputs, self.layout.nbytes, stream)
        self._num_runs += 1
        if self._num_runs == 2:  # the first run is the library's own preparation
            self._capture(stream)
        if self._graph is not None:
            self._device.launch_graph(self._graph, stream)
        else:
            self._queue_work(stream)

    def _queue_work(self, stream: Stream) -> None:
        self._context.enqueue(stream)
        self._kernels.write(self._write, stream)

    def _capture(self, stream: Stream) -> None:
        self._device.begin_capture(stream)
        try:
            self._queue_work(stream)
        except TrtllmError as error:
            self._device.abandon_capture(stream)
            self.note = error.what
            return
        try:
            self._graph = self._device.end_capture(stream)
        except TrtllmError as error:
            self.note = error.what


def extents_of(plan: Plan, tokens_per_block: int) -> list[Extents]:
    """The shapes of a plan's profiles."""
    found = []
    for profile in range(plan.num_profiles):
        rows, tokens = plan.largest_shape("input_ids", profile)
        columns = plan.largest_shape(table_names(plan)[0], profile)[1]
        found.append(Extents(profile, rows, tokens, columns, (tokens + tokens_per_block - 2) // tokens_per_block + 1))
    return found


def table_names(plan: Plan) -> Sequence[str]:
    """The inputs that are block tables: one, or one for each group of layers."""
    return sorted((name for name in plan.tensors if name.startswith("block_table")), key=lambda name: (len(name), name))


def input_layout(plan: Plan, extents: Extents) -> InputLayout:
    """The integers of a run, each part where a tensor may begin."""
    groups = len(table_names(plan))
    sizes = [extents.rows * extents.tokens, extents.rows, extents.rows, *[extents.rows * extents.columns] * groups]
    offsets = [0]
    for size in [*sizes, groups * extents.rows * extents.written]:
        offsets.append(offsets[-1] + aligned(4 * size))
    return InputLayout(offsets[0], offsets[1], offsets[2], tuple(offsets[3 : 3 + groups]), offsets[-2], offsets[-1])


def output_offsets(plan: Plan, extents: Extents) -> dict[str, int]:
    """Where the outputs of a run lie, in bytes from the first."""
    offsets, end = {}, 0
    for info in _outputs(plan):
        offsets[info.name] = end
        end += aligned(_elements(info.name, info.shape, extents) * info.item_nbytes)
    return offsets


def outputs_nbytes(plan: Plan, extents: Extents) -> int:
    """Bytes of all outputs of a run."""
    return sum(aligned(_elements(info.name, info.shape, extents) * info.item_nbytes) for info in _outputs(plan))


def _outputs(plan: Plan) -> list[TensorInfo]:
    """The candidates side by side, then the others."""
    first = [plan.tensors[name] for name in CANDIDATES if name in plan.tensors]
    return first + [info for info in plan.tensors.values() if not info.is_input and info.name not in CANDIDATES]


def _elements(name: str, shape: tuple[int, ...], extents: Extents) -> int:
    """Elements of an output: its first extent is the rows, and of more than two the second is the tokens."""
    rest = shape[1:]
    if (name == "logits" and len(shape) == 3) or name.startswith("present_"):
        rest = (extents.tokens, *shape[2:])
    return extents.rows * int(np.prod(rest, dtype=np.int64))


def _inputs(plan: Plan, extents: Extents, layout: InputLayout) -> list[tuple[str, int, tuple[int, ...]]]:
    rows = extents.rows
    return [
        ("input_ids", layout.tokens, (rows, extents.tokens)),
        ("past_lengths", layout.past_lengths, (rows,)),
        ("lengths", layout.lengths, (rows,)),
        *(
            (name, offset, (rows, extents.columns))
            for name, offset in zip(table_names(plan), layout.tables, strict=True)
        ),
    ]
