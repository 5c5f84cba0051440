"""Strips whatever directory it is given, and restores it: a checkpoint of any format with safetensors, or an engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import recipe_from_json
from trtllm.checkpoints.selection import Selection
from trtllm.compiler.engine import MANIFEST, RECIPES, Engine, WeightEntry, check_free, open_engine
from trtllm.compiler.pruning.checkpoints import open_checkpoint_files, restore_checkpoint, strip_checkpoint
from trtllm.compiler.stripping import (
    EnginePayloads,
    Payload,
    check_strippable,
    is_stripped,
    restore_engine,
    strip_engine,
)
from trtllm.errors import BadInputError, UsageError
from trtllm.progress import Progress


@dataclass(frozen=True)
class Stripped:
    """What was taken out, or would be."""

    kind: str
    """ "engine" or "checkpoint"."""
    names: tuple[str, ...]
    payload_bytes: int
    bytes_before: int
    bytes_after: int | None
    """Of the weights' files; None when nothing was written."""

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tensors": list(self.names),
            "payload_bytes": self.payload_bytes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


def strip_path(path: Path, out: Path, selection: Selection, progress: Progress, *, dry_run: bool = False) -> Stripped:
    """Writes `path` without the selected weights to `out`; with `dry_run` it only says which those are."""
    if not path.is_dir():
        raise BadInputError(f"there is no directory {path}", "give a checkpoint or an engine directory")
    check_free(out.absolute())
    if (path / MANIFEST).is_file():
        return _strip_engine(open_engine(path), out, selection, dry_run=dry_run)
    files = open_checkpoint_files(path)
    names = selection.of(files.shapes())
    chosen = set(names)
    payload = sum(
        tensor.spec.nbytes for tensors in files.files.values() for name, tensor in tensors.items() if name in chosen
    )
    if dry_run:
        return Stripped("checkpoint", names, payload, files.nbytes, None)
    strip_checkpoint(files, out, names, progress)
    return Stripped("checkpoint", names, payload, files.nbytes, open_checkpoint_files(out).nbytes)


def _strip_engine(engine: Engine, out: Path, selection: Selection, *, dry_run: bool) -> Stripped:
    check_strippable(engine)
    missing = set(engine.manifest.stripped)
    present = {entry.name: entry.shape for entry in engine.manifest.weights if entry.name not in missing}
    names = selection.of(present)
    payload = sum(entry.nbytes for entry in engine.manifest.weights if entry.name in set(names))
    after = None if dry_run else strip_engine(engine, out, selection).nbytes
    return Stripped("engine", names, payload, engine.nbytes, after)


def restore_path(path: Path, out: Path, source: str, progress: Progress) -> int:
    """Writes `path` with what was stripped from it taken from `source`; returns the number of tensors.

    Raises BadInputError that names the tensors whose hash is not that of what was stripped.
    """
    if not path.is_dir():
        raise BadInputError(f"there is no directory {path}", "give a pruned checkpoint or a stripped engine")
    check_free(out.absolute())
    from_engine = (Path(source) / MANIFEST).is_file()
    if not (path / MANIFEST).is_file():
        if from_engine:
            raise UsageError(
                f"{source} is an engine, whose weights are in the engine's own layout",
                "restore a checkpoint from a checkpoint",
            )
        return restore_checkpoint(open_checkpoint_files(path), out, source, progress)
    engine = open_engine(path)
    if not is_stripped(engine.manifest):
        raise UsageError(f"{path} is not stripped", "there is nothing to restore")
    progress.stage("restoring the engine")
    payload = _engine_payload(engine, open_engine(source)) if from_engine else _checkpoint_payload(engine, source)
    restore_engine(engine, out, payload)
    return len(engine.manifest.stripped)


def _engine_payload(engine: Engine, other: Engine) -> Payload:
    payloads, entries = EnginePayloads(other), {entry.name: entry for entry in other.manifest.weights}
    lacking = [name for name in engine.manifest.stripped if name not in payloads]
    if lacking:
        raise BadInputError(
            f"{other.path} does not hold {', '.join(lacking)}", "give an engine of the same model and build"
        )
    return lambda entry: payloads(entries[entry.name])


def _checkpoint_payload(engine: Engine, source: str) -> Payload:
    """Runs the engine's recipes on the tensors of a model."""
    from trtllm.frontends.detect import open_model

    data = json.loads((engine.path / RECIPES).read_text(encoding="utf-8"))
    reader = RecipeReader(open_model(source).tensors)

    def payload(entry: WeightEntry) -> Any:
        for chunk in reader.chunks(recipe_from_json(data[entry.name])):
            yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data

    return payload
