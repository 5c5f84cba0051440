"""Streams a graph's weights into one file, in order, hashing as it writes; nothing is held longer than a chunk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import QuantizedScales, QuantizedValues, Recipe
from trtllm.compiler.engine import WeightEntry
from trtllm.compiler.ir.weights import Weight
from trtllm.progress import Progress

ALIGNMENT = 4096
"""Bytes: a page, so that a weight can be mapped."""
SMALL_ALIGNMENT = 64


def layout(weights: Iterable[Weight]) -> dict[str, int]:
    """The byte offset of each weight by name."""
    offsets, end = {}, 0
    for weight in weights:
        alignment = ALIGNMENT if weight.recipe.nbytes >= 1 << 20 else SMALL_ALIGNMENT
        end = -(-end // alignment) * alignment
        offsets[weight.name or ""] = end
        end += weight.recipe.nbytes
    return offsets


def write_weights(
    path: Path, weights: list[Weight], reader: RecipeReader, progress: Progress
) -> tuple[list[WeightEntry], str]:
    """Writes every weight at its `layout` offset. Returns the entries and the file's sha256."""
    offsets = layout(weights)
    whole = hashlib.sha256()
    entries = []
    with path.open("wb", buffering=0) as file:
        end = 0
        for weight in weights:
            offset = offsets[weight.name or ""]
            end = _pad(file, whole, end, offset)
            digest = hashlib.sha256()
            for chunk in reader.chunks(weight.recipe):
                payload = memoryview(chunk.reshape(-1).view("u1"))
                _write_all(file, payload)
                digest.update(payload)
                whole.update(payload)
                progress.advance(payload.nbytes)
                end += payload.nbytes
            assert end - offset == weight.recipe.nbytes, weight.name
            entries.append(_entry(weight, digest.hexdigest(), path.name, offset))
    return entries, whole.hexdigest()


def _write_all(file: Any, payload: memoryview) -> None:
    while payload.nbytes:
        payload = payload[file.write(payload) :]


def _pad(file: Any, whole: Any, end: int, offset: int) -> int:
    if end < offset:
        zeros = bytes(offset - end)
        _write_all(file, memoryview(zeros))
        whole.update(zeros)
    return offset


def _entry(weight: Weight, digest: str, file: str, offset: int) -> WeightEntry:
    recipe = weight.recipe
    return WeightEntry(
        weight.name or "", recipe.shape, recipe.dtype.value, digest, recipe.nbytes, file, offset, quantization_of(recipe)
    )


def quantization_of(recipe: Recipe) -> str | None:
    """ "int4 block 32" for a weight made by quantization, None otherwise."""
    if isinstance(recipe, QuantizedValues | QuantizedScales):
        return f"int{recipe.bits} block {recipe.block_size}"
    return next(filter(None, map(quantization_of, recipe.operands)), None)
