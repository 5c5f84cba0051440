"""Strips whatever directory it is given, and restores it: a checkpoint of any format with safetensors, or an engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
from trtllm.errors import BadInputError, UsageError, listed
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
    _check_directory(path, "give a checkpoint or an engine directory")
    check_free(out.absolute())
    if (path / MANIFEST).is_file():
        return _strip_engine(open_engine(path), out, selection, dry_run=dry_run)
    files = open_checkpoint_files(path)
    names = _selected(selection, files.shapes(), path, is_pruned=files.is_pruned)
    chosen = set(names)
    payload = sum(
        tensor.spec.nbytes for tensors in files.files.values() for name, tensor in tensors.items() if name in chosen
    )
    if dry_run:
        return Stripped("checkpoint", names, payload, files.nbytes, None)
    strip_checkpoint(files, out, names, progress)
    return Stripped("checkpoint", names, payload, files.nbytes, open_checkpoint_files(out).nbytes)


def _check_directory(path: Path, hint: str) -> None:
    if path.is_file():
        raise UsageError(
            f"{path} is a file, and weights are taken out of directories",
            "a single file becomes a directory with trtllm-convert MODEL --output-dir DIR, or trtllm-build",
        )
    if not path.is_dir():
        raise BadInputError(f"there is no directory {path}", hint)


def _strip_engine(engine: Engine, out: Path, selection: Selection, *, dry_run: bool) -> Stripped:
    check_strippable(engine)
    missing = set(engine.manifest.stripped)
    present = {entry.name: entry.shape for entry in engine.manifest.weights if entry.name not in missing}
    names = _selected(selection, present, engine.path, is_pruned=bool(missing))
    payload = sum(entry.nbytes for entry in engine.manifest.weights if entry.name in set(names))
    after = None if dry_run else strip_engine(engine, out, selection).nbytes
    return Stripped("engine", names, payload, engine.nbytes, after)


def _selected(
    selection: Selection, present: Mapping[str, tuple[int, ...]], path: Path, *, is_pruned: bool
) -> tuple[str, ...]:
    """Of the tensors that are there. Raises UsageError that says so when what is meant is gone already."""
    try:
        return selection.of(present)
    except UsageError as error:
        if not is_pruned:
            raise
        raise UsageError(
            f"{error.what}, and {path} is pruned already",
            "trtllm-inspect PATH --weights shows what is in it; --prune-all takes everything",
        ) from None


def restore_path(path: Path, out: Path, source: str, progress: Progress) -> int:
    """Writes `path` with what was stripped from it taken from `source`; returns the number of tensors.

    Raises BadInputError that names the tensors whose hash is not that of what was stripped.
    """
    _check_directory(path, "give a pruned checkpoint or a stripped engine")
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
    hint = "give a full engine of the same model and build"
    lacking = [name for name in engine.manifest.stripped if name not in payloads]
    if lacking:
        raise BadInputError(f"{other.path} lacks {len(lacking)} of the weights: {listed(lacking)}", hint)
    own = {entry.name: entry for entry in engine.manifest.weights}
    unlike = [
        name
        for name in engine.manifest.stripped
        if (own[name].shape, own[name].dtype) != (entries[name].shape, entries[name].dtype)
    ]
    if unlike:
        raise BadInputError(f"{len(unlike)} weights of {other.path} have other shapes or types: {listed(unlike)}", hint)
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
