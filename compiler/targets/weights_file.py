"""Streams a graph's weights into one file, in order, hashing and writing while the next one is made."""

from __future__ import annotations

import ctypes
import functools
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.hashing import Digest, hashes_in_pairs, new_sha256, update_each, update_in_turn
from trtllm.checkpoints.recipes import (
    AsymmetricMinima,
    AsymmetricScales,
    AsymmetricValues,
    Dequantized,
    QuantizedScales,
    QuantizedValues,
    Recipe,
)
from trtllm.compiler.engine import WeightEntry
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.stripping import compact_offsets
from trtllm.progress import Progress

ALIGNMENT = 4096
"""Bytes: a page, so that a weight can be mapped."""
SMALL_ALIGNMENT = 64
_BATCH_BYTES = 1 << 20
"""Bytes of small chunks that are handed to the threads together: waking a thread costs as much as hashing 50 kB."""
_STARTED_BYTES = 8 << 20
"""Bytes after which the system is told to begin writing them to the disk."""
_SYNC_FILE_RANGE_WRITE = 2


def layout(weights: Iterable[Weight]) -> dict[str, int]:
    """The byte offset of each weight by name."""
    offsets, end = {}, 0
    for weight in weights:
        alignment = ALIGNMENT if weight.recipe.nbytes >= 1 << 20 else SMALL_ALIGNMENT
        end = -(-end // alignment) * alignment
        offsets[weight.name or ""] = end
        end += weight.recipe.nbytes
    return offsets


def file_nbytes(weights: list[Weight]) -> int:
    """Bytes of the file that `write_weights` makes of these weights."""
    if not weights:
        return 0
    last = weights[-1]
    return layout(weights)[last.name or ""] + last.recipe.nbytes


def in_file_order(weights: Iterable[Weight], sources: Iterable[str]) -> list[Weight]:
    """The weights in the order in which the checkpoint's files (tensor names in `sources`) hold what they are made of.

    So the files are read from front to back. The scales of a quantization stay behind its values.
    """
    position = {name: index for index, name in enumerate(sources)}
    return sorted(
        weights, key=lambda weight: min((position.get(name, 0) for name in weight.recipe.sources()), default=0)
    )


def write_weights(
    path: Path,
    weights: list[Weight],
    reader: RecipeReader,
    progress: Progress,
    offsets: Mapping[str, int] | None = None,
) -> tuple[list[WeightEntry], str]:
    """Writes every weight at its `layout` offset, or that of `offsets`. Returns the entries and the file's sha256."""
    offsets = layout(weights) if offsets is None else offsets
    pieces = (
        Piece(weight.name or "", offsets[weight.name or ""], weight.recipe.nbytes, reader.chunks(weight.recipe))
        for weight in weights
    )
    digests, whole = write_pieces(path, pieces, reader.chunk_bytes, progress)
    entries = [_entry(weight, digests[weight.name or ""], path.name, offsets[weight.name or ""]) for weight in weights]
    return entries, whole


@dataclass(frozen=True, eq=False)
class Piece:
    """A weight to be written: its place in the file, and its payload in chunks."""

    name: str
    offset: int
    nbytes: int
    chunks: Iterable[np.ndarray]


def write_pieces(path: Path, pieces: Iterable[Piece], budget: int, progress: Progress) -> tuple[dict[str, str], str]:
    """Writes pieces, given by rising offset. Returns the sha256 of each and of the file; `budget` bytes may wait."""
    digests: dict[str, Any] = {}
    with path.open("wb", buffering=0) as file, _Output(file, budget) as output:
        for piece in pieces:
            output.pad(piece.offset)
            digest = digests[piece.name] = new_sha256()
            for chunk in piece.chunks:
                payload = chunk.reshape(-1).view("u1").data
                output.put(payload, digest)
                progress.advance(payload.nbytes)
            assert output.end - piece.offset == piece.nbytes, piece.name
        output.drain()
    return {name: digest.hexdigest() for name, digest in digests.items()}, output.whole.hexdigest()


class _Output:
    """Threads that take the same chunks in the same order: one writes, one hashes the file and one the weights.

    Where both hashes can be made in one pass, one thread makes them. The system is told to write to the disk as chunks
    come, so that syncing the file at the end finds little to do. At most `budget` bytes wait for the threads, or one
    chunk if that is larger. A thread's error is raised by a later call.
    """

    def __init__(self, file: Any, budget: int) -> None:
        self.whole = new_sha256()
        self.end = 0
        self._file = file
        self._budget = budget
        self._batch: list[memoryview] = []
        self._digests: list[Digest] = []
        self._batch_bytes = 0
        self._waiting: deque[tuple[int, list[Future[Any]]]] = deque()
        self._waiting_bytes = 0
        self._written = self._started = 0
        self._writer, self._file_hasher, self._weight_hasher = (
            ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("write", "hash-file", "hash-weight")
        )

    def put(self, payload: memoryview, digest: Digest) -> None:
        """Takes a chunk; `digest` is told of it. Waits while too much is under way."""
        if self._batch_bytes + payload.nbytes > _BATCH_BYTES:
            self._hand_over()
        while self._waiting and self._waiting_bytes + self._batch_bytes + payload.nbytes > self._budget:
            self._finish_oldest()
        self._batch.append(payload)
        self._digests.append(digest)
        self._batch_bytes += payload.nbytes
        self.end += payload.nbytes

    def _hand_over(self) -> None:
        if not self._batch:
            return
        batch, digests = self._batch, self._digests
        tasks = [self._writer.submit(self._write, batch)]
        if hashes_in_pairs():
            tasks.append(self._file_hasher.submit(update_in_turn, self.whole, digests, batch))
        else:
            tasks.append(self._file_hasher.submit(update_each, [self.whole] * len(batch), batch))
            tasks.append(self._weight_hasher.submit(update_each, digests, batch))
        self._waiting.append((self._batch_bytes, tasks))
        self._waiting_bytes += self._batch_bytes
        self._batch, self._digests, self._batch_bytes = [], [], 0

    def pad(self, offset: int) -> None:
        """Writes zeros up to `offset`."""
        if self.end < offset:
            self.put(memoryview(bytes(offset - self.end)), new_sha256())

    def drain(self) -> None:
        """Returns when everything is written and hashed."""
        self._hand_over()
        while self._waiting:
            self._finish_oldest()
        self._start_writing()

    def _finish_oldest(self) -> None:
        nbytes, tasks = self._waiting[0]
        for task in tasks:
            task.result()
        self._waiting.popleft()
        self._waiting_bytes -= nbytes

    def _write(self, batch: list[memoryview]) -> None:
        for payload in batch:
            while payload.nbytes:
                count = self._file.write(payload)
                payload = payload[count:]
                self._written += count
        if self._written - self._started >= _STARTED_BYTES:
            self._start_writing()

    def _start_writing(self) -> None:
        _start_writing(self._file.fileno(), self._started, self._written - self._started)
        self._started = self._written

    def __enter__(self) -> _Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._writer, self._file_hasher, self._weight_hasher):
            pool.shutdown(wait=True, cancel_futures=True)


def _start_writing(descriptor: int, offset: int, nbytes: int) -> None:
    """Begins to write a range to the disk and does not wait for it; nothing where the system has no such call."""
    call = _sync_file_range()
    if call is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(nbytes), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


@functools.cache
def _sync_file_range() -> Any:
    return getattr(ctypes.CDLL(None), "sync_file_range", None)


def write_kept_weights(
    path: Path, weights: list[Weight], reader: RecipeReader, progress: Progress
) -> tuple[list[WeightEntry], str, tuple[str, ...]]:
    """`write_weights` for a checkpoint that may be pruned: what it lacks is left out, and named in the third result.

    The entries are those of the full file; weights that were left out have no hash. See `trtllm.compiler.stripping`.
    """
    missing = tuple(weight.name or "" for weight in weights if reader.lacks(weight.recipe))
    if not missing:
        return (*write_weights(path, weights, reader, progress), ())
    full = layout(weights)
    entries = {weight.name or "": _entry(weight, "", path.name, full[weight.name or ""]) for weight in weights}
    kept = [weight for weight in weights if weight.name not in missing]
    if not kept:
        return list(entries.values()), "", missing
    offsets = compact_offsets((weight.name or "", weight.recipe.nbytes) for weight in kept)
    written, digest = write_weights(path, kept, reader, progress, offsets)
    entries |= {entry.name: replace(entry, offset=full[entry.name]) for entry in written}
    return list(entries.values()), digest, missing


def _entry(weight: Weight, digest: str, file: str, offset: int) -> WeightEntry:
    recipe = weight.recipe
    return WeightEntry(
        weight.name or "",
        recipe.shape,
        recipe.dtype.value,
        digest,
        recipe.nbytes,
        file,
        offset,
        quantization_of(recipe),
    )


def quantization_of(recipe: Recipe) -> str | None:
    """ "int4 block 32" for a weight made by quantization, None otherwise."""
    if isinstance(recipe, QuantizedValues | QuantizedScales):
        return f"int{recipe.bits} block {recipe.block_size}"
    if isinstance(recipe, AsymmetricValues | AsymmetricScales | AsymmetricMinima):
        return f"uint4 block {recipe.block_size}, minima"
    if isinstance(recipe, Dequantized):
        return None
    return next(filter(None, map(quantization_of, recipe.operands)), None)
