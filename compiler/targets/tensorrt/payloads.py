"""The weights of a network in a mapped scratch file: the builder refers to them, the page cache holds them."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.engine import ENGINE, WeightEntry
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.targets.weights_file import layout, write_weights
from trtllm.progress import Progress

SCRATCH = ".weights-for-the-builder"


@dataclass(frozen=True, eq=False)
class Payloads:
    """Bytes of each weight, and the manifest's entries of them."""

    mapping: np.ndarray
    offsets: dict[str, int]
    entries: list[WeightEntry]

    def of(self, weight: Weight) -> np.ndarray:
        """The payload as bytes, valid inside `stored_weights`."""
        start = self.offsets[weight.name or ""]
        return self.mapping[start : start + weight.recipe.nbytes]


@contextmanager
def stored_weights(folder: Path, weights: list[Weight], reader: RecipeReader, progress: Progress) -> Iterator[Payloads]:
    """Streams the weights into a scratch file of `folder` that is gone afterwards, one chunk in memory at a time."""
    path = folder / SCRATCH
    try:
        entries, _ = write_weights(path, weights, reader, progress)
        # The plan holds them in the library's own layout: only names, shapes and hashes are ours to tell.
        entries = [replace(entry, file=ENGINE, offset=0) for entry in entries]
        with path.open("rb") as file:
            path.unlink()
            size = file.seek(0, 2)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        yield Payloads(np.frombuffer(mapping, np.uint8), layout(weights), entries)
    finally:
        path.unlink(missing_ok=True)
