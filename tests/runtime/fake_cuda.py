"""A GPU that is not there: its memory is the host's, and queued work is done when the stream is waited for.

What real streams do to careless callers happens here as well: memory is garbage until it is written, pinned memory is
read when a copy's turn comes, launches and graphs keep the addresses and numbers that they were made with, and memory
that is gone is an error.
"""

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from trtllm.errors import TargetError
from trtllm.runtime.cuda.driver import Arguments, Memory, PinnedMemory, Stream


class FakeDevice:
    """The methods of `trtllm.runtime.cuda.driver.Device`."""

    def __init__(self, *, compute_capability: str = "90", driver_version: int = 13000) -> None:
        self.name = "Fake GPU"
        self.compute_capability = compute_capability
        self.driver_version = driver_version
        self.refuses_capture = False
        self.counts = {"graph": 0, "enqueue": 0, "kernel": 0, "copied_to_host": 0}
        self._regions: dict[int, tuple[np.ndarray, bool]] = {}
        self._queues: dict[int, list[Callable[[], None]]] = {}
        self._captured: dict[int, list[Callable[[], None]]] = {}

    def make_current(self) -> None:
        pass

    # -- memory ------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Memory:
        address = self._region(nbytes, 0xA5, pinned=False)
        memory = Memory(address, nbytes)
        weakref.finalize(memory, self._regions.pop, address)
        return memory

    def pinned(self, nbytes: int) -> PinnedMemory:
        address = self._region(max(nbytes, 1), 0, pinned=True)
        memory = PinnedMemory(address, self._regions[address][0][-max(nbytes, 1) :])
        weakref.finalize(memory, self._regions.pop, address)
        return memory

    def _region(self, nbytes: int, value: int, *, pinned: bool) -> int:
        array = np.full(nbytes + 256, value, np.uint8)
        skipped = -array.ctypes.data % 256
        array = array[skipped : skipped + nbytes]
        self._regions[array.ctypes.data] = (array, pinned)
        return array.ctypes.data

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        """Memory that is allocated now. Raises TargetError for an access outside."""
        for begin, (array, _) in self._regions.items():
            if begin <= address and address + nbytes <= begin + len(array):
                return array[address - begin : address - begin + nbytes]
        raise TargetError(f"illegal access to {nbytes} bytes at {address}", "")

    def free_bytes(self) -> int:
        return 1 << 30

    def to_device(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        if any(begin <= source < begin + len(array) and pinned for begin, (array, pinned) in self._regions.items()):
            self.queue(stream, lambda: self._move(target, self.bytes_at(source, nbytes)))
        else:
            taken = np.frombuffer(ctypes.string_at(source, nbytes), np.uint8)
            self.queue(stream, lambda: self._move(target, taken))

    def to_host(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self.counts["copied_to_host"] += nbytes
        self.queue(stream, lambda: self._move(target, self.bytes_at(source, nbytes)))

    def on_device(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        self.queue(stream, lambda: self._move(target, self.bytes_at(source, nbytes).copy()))

    def clear(self, target: int, nbytes: int, stream: Stream) -> None:
        self.queue(stream, lambda: self._move(target, np.zeros(nbytes, np.uint8)))

    def _move(self, target: int, data: np.ndarray) -> None:
        self.bytes_at(target, len(data))[:] = data

    # -- streams and graphs --------------------------------------------------------------------------------------

    def stream(self) -> Stream:
        handle = len(self._queues) + 1
        self._queues[handle] = []
        return Stream(handle, None)

    def queue(self, stream: Stream, work: Callable[[], None]) -> None:
        self._captured.get(stream.handle, self._queues[stream.handle]).append(work)

    def is_capturing(self, stream: Stream) -> bool:
        return stream.handle in self._captured

    def synchronize(self, stream: Stream) -> None:
        if stream.handle in self._captured:
            raise TargetError("a stream cannot be waited for while it is captured", "")
        queue, self._queues[stream.handle] = self._queues[stream.handle], []
        for work in queue:
            work()

    def event(self) -> Any:
        return object()

    def record(self, event: Any, stream: Stream) -> None:
        self.queue(stream, lambda: None)

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        return 0.0

    def begin_capture(self, stream: Stream) -> None:
        self._captured[stream.handle] = []

    def end_capture(self, stream: Stream) -> Any:
        return tuple(self._captured.pop(stream.handle))

    def abandon_capture(self, stream: Stream) -> None:
        self._captured.pop(stream.handle)

    def launch_graph(self, graph: Any, stream: Stream) -> None:
        self.counts["graph"] += 1
        for work in graph:
            self.queue(stream, work)

    # -- kernels -----------------------------------------------------------------------------------------------

    def kernels(self, ptx: bytes) -> "FakeKernels":
        return FakeKernels(ptx.decode())

    def launch(self, kernel: str, grid: tuple[int, int], threads: int, arguments: Arguments, stream: Stream) -> None:
        self.counts["kernel"] += 1
        name, width = kernel.rsplit("_", 1)
        values = [value.value for value in arguments.values]
        work = {"write_tokens": self._write_tokens, "copy_blocks": self._copy_blocks}[name]
        self.queue(stream, lambda: work(int(width), grid, *values))

    def _integers(self, address: int, count: int) -> np.ndarray:
        return self.bytes_at(address, 4 * count).view(np.int32)

    def _planes(self, address: int, count: int) -> list[list[int]]:
        return self.bytes_at(address, 40 * count).view(np.int64).reshape(count, 5).tolist()

    def _vectors(self, address: int, *shape: int) -> np.ndarray:
        return self.bytes_at(address, int(np.prod(shape))).reshape(shape)

    def _write_tokens(
        self, width: int, grid: tuple[int, int], planes: int, past_lengths: int, lengths: int, blocks: int,
        rows: int, tokens: int, columns: int, size: int, nowhere: int,
    ) -> None:  # fmt: skip
        """What cache_kernels.cu says, one token after the other."""
        assert grid[0] == rows * tokens
        past, new = self._integers(past_lengths, rows), self._integers(lengths, rows)
        for source, pool, heads, vectors, group in self._planes(planes, grid[1]):
            head = vectors * width
            table = self._integers(blocks + 4 * group * rows * columns, rows * columns).reshape(rows, columns)
            given = self._vectors(source, rows, tokens, heads, head)
            for row in range(rows):
                for offset in range(min(new[row], tokens)):
                    position = past[row] + offset
                    block = table[row, position // size - past[row] // size]
                    if block == nowhere:
                        continue
                    target = self._vectors(pool + int(block) * heads * size * head, heads, size, head)
                    target[:, position % size] = given[row, offset]
                    if offset + 1 == new[row] and position - position % size >= past[row]:
                        target[:, position % size + 1 :] = 0

    def _copy_blocks(
        self, width: int, grid: tuple[int, int], planes: int, copies: int, num_blocks: int, size: int
    ) -> None:
        """In no order: what is read is read before anything is written."""
        wanted = self._integers(copies, 4 * grid[0]).reshape(-1, 4).tolist()
        moves = []
        for pool, host, heads, vectors, group in self._planes(planes, grid[1]):
            head = vectors * width

            def block(number: int, bases=(pool, host), heads=heads, head=head) -> np.ndarray:
                base, index = (bases[0], number) if number < num_blocks else (bases[1], number - num_blocks)
                return self._vectors(base + index * heads * size * head, heads, size, head)

            for its_group, source, destination, count in wanted:
                if its_group == group:
                    moves.append((block(destination)[:, :count], block(source)[:, :count].copy()))
        for target, data in moves:
            target[:] = data


class FakeKernels:
    """The kernels that a module of PTX declares, by name."""

    def __init__(self, ptx: str) -> None:
        self._ptx = ptx

    def kernel(self, name: str) -> str:
        if f".entry {name}(" not in self._ptx:
            raise TargetError(f"the module has no kernel {name}", "")
        return name
