"""The kernels of cache_kernels.cu as functions: writing new tokens to a cache of blocks, and copying blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from math import gcd
from typing import Any

import numpy as np

from trtllm.runtime.cuda.driver import Arguments, Device, Memory, Stream

BlockCopy = tuple[int, int, int, int]
"""Group, source, destination, tokens."""
PTX = "cache_kernels.ptx"
_WIDTHS = (16, 4, 2)
_THREADS = 128


@dataclass(frozen=True)
class Plane:
    """Keys or values of one layer. Sizes in bytes; `head_nbytes` is of one head of one token."""

    pool: int
    host: int
    heads: int
    head_nbytes: int
    group: int


@dataclass(frozen=True)
class TokenWrite:
    """One launch of write_tokens: addresses on the GPU, extents, and where the planes' tokens come from."""

    planes: Memory
    arguments: Arguments
    grid: tuple[int, int]


class CacheKernels:
    """The kernels in the widest vectors that the planes' heads consist of."""

    def __init__(
        self, device: Device, planes: Sequence[Plane], num_blocks: int, tokens_per_block: int, stream: Stream
    ) -> None:
        self._device = device
        self._planes = tuple(planes)
        self._tokens_per_block = tokens_per_block
        self._num_blocks = num_blocks
        common = gcd(*(plane.head_nbytes for plane in planes))
        self.width = next(width for width in _WIDTHS if common % width == 0)
        modules = device.kernels(resources.files("trtllm.runtime.cuda").joinpath(PTX).read_bytes())
        self._write = modules.kernel(f"write_tokens_{self.width}")
        self._copy = modules.kernel(f"copy_blocks_{self.width}")
        self._copy_planes = _uploaded(device, stream, [self._row(plane, plane.pool, plane.host) for plane in planes])

    def _row(self, plane: Plane, first: int, second: int) -> tuple[int, ...]:
        return (first, second, plane.heads, plane.head_nbytes // self.width, plane.group)

    def prepared_write(
        self,
        sources: Sequence[int],
        addresses: tuple[int, int, int],
        extents: tuple[int, int, int],
        nowhere: int,
        stream: Stream,
    ) -> TokenWrite:
        """A launch for one shape of step, whose addresses stay.

        Args:
            sources: of each plane, new tokens [rows, tokens, heads, head size].
            addresses: int32 past lengths [rows], lengths [rows], and blocks [groups, rows, columns] of the new tokens.
            extents: rows, tokens, columns.
            nowhere: the block whose tokens are dropped.
            stream: to bring the launch's own table to the GPU with.
        """
        pairs = zip(self._planes, sources, strict=True)
        planes = _uploaded(self._device, stream, [self._row(plane, source, plane.pool) for plane, source in pairs])
        rows, tokens, columns = extents
        integers = (rows, tokens, columns, self._tokens_per_block, nowhere)
        return TokenWrite(planes, Arguments((planes.address, *addresses), integers), (rows * tokens, len(self._planes)))

    def write(self, write: TokenWrite, stream: Stream) -> None:
        self._device.launch(self._write, write.grid, _THREADS, write.arguments, stream)

    def copy(self, copies: Memory, first: int, count: int, stream: Stream) -> None:
        """Does `count` independent copies from number `first` of the int32 [n, 4] at `copies`."""
        address = copies.address + 16 * first
        arguments = Arguments((self._copy_planes.address, address), (self._num_blocks, self._tokens_per_block))
        self._device.launch(self._copy, (count, len(self._planes)), _THREADS, arguments, stream)


def independent_runs(copies: Sequence[BlockCopy]) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of copies that may be done at the same time: none touches what another one writes."""
    first = 0
    written: set[tuple[int, int]] = set()
    read: set[tuple[int, int]] = set()
    for index, (group, source, destination, _) in enumerate(copies):
        if (group, source) in written or (group, destination) in written or (group, destination) in read:
            yield first, index
            first, written, read = index, set(), set()
        written.add((group, destination))
        read.add((group, source))
    if first < len(copies):
        yield first, len(copies)


def _uploaded(device: Device, stream: Stream, rows: list[tuple[int, ...]]) -> Memory:
    table: Any = np.array(rows, np.int64)
    memory = device.allocate(table.nbytes)
    device.to_device(memory.address, table.ctypes.data, table.nbytes, stream)
    device.synchronize(stream)
    return memory
