"""Engines without (some of) their weights: what they are, how they are made, and how a machine refuses to run them.

A stripped engine is a full one but for `rank0.weights`: it holds only the weights that were kept, one after the other
in the order of their offsets, each aligned to 64 bytes, and is absent when none was. `manifest.json` names the others
in `stripped` and keeps every weight's shape, type, hash, size and offset *in the full file*. The graph is untouched:
it refers to the full file, so putting the weights back makes the engine that it was, to the last byte.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from trtllm.checkpoints.selection import Selection
from trtllm.compiler.engine import MANIFEST, WEIGHTS, Engine, EngineWriter, Manifest, WeightEntry, open_engine, writing
from trtllm.errors import BadInputError, UnsupportedModelError, UsageError, listed

KEPT_ALIGNMENT = 64
"""Bytes, in a file that holds only kept weights."""
_CHUNK = 8 << 20
_NOT_THOSE = "restore from the model that the engine was built from; trtllm-refit takes the weights of another"

Payload = Callable[[WeightEntry], Iterable[bytes | memoryview]]
"""The bytes of a weight, in pieces."""


def is_stripped(manifest: Manifest) -> bool:
    """Whether weights are missing from the engine."""
    return bool(manifest.stripped)


def stripped_names(manifest: Manifest) -> tuple[str, ...]:
    """Names of the weights that are missing."""
    return manifest.stripped


def refuse_stripped(engine: Engine) -> None:
    """Raises UsageError when the engine cannot run because weights are missing."""
    if is_stripped(engine.manifest):
        count, total = len(engine.manifest.stripped), len(engine.manifest.weights)
        raise UsageError(
            f"{engine.path} is stripped: {count} of its {total} weights are not in it",
            f"put them back: trtllm-refit --engine-dir {engine.path} --checkpoint-dir MODEL",
        )


def kept_offsets(manifest: Manifest) -> dict[str, int]:
    """Where each weight that a stripped engine kept lies in its file, in bytes."""
    missing = set(manifest.stripped)
    return compact_offsets((entry.name, entry.nbytes) for entry in by_offset(manifest) if entry.name not in missing)


def compact_offsets(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Offsets of payloads, given by name and bytes, that lie one after the other."""
    offsets, end = {}, 0
    for name, nbytes in sizes:
        offsets[name] = end = _aligned(end)
        end += nbytes
    return offsets


def strip_engine(engine: Engine, out: Path, selection: Selection) -> Engine:
    """Writes `engine` without the selected weights to `out`, which must not exist, and opens it.

    Weights that are missing already stay missing. Raises UnsupportedModelError for a target whose engine file holds
    the weights itself.
    """
    check_strippable(engine)
    missing = set(engine.manifest.stripped)
    present = {entry.name: entry.shape for entry in engine.manifest.weights if entry.name not in missing}
    missing |= set(selection.of(present))
    names = tuple(entry.name for entry in engine.manifest.weights if entry.name in missing)
    with writing(out) as writer:
        manifest = replace(engine.manifest, stripped=names)
        write_kept(writer, manifest, EnginePayloads(engine))
        _finish(engine, writer, manifest)
    return open_engine(out, verify=False)


def restore_engine(engine: Engine, out: Path, payload: Payload) -> Engine:
    """Writes `engine` with its missing weights taken from `payload`, verified by their hashes, to `out`.

    Raises BadInputError that names weights whose bytes are not those that were stripped.
    """
    kept, missing = EnginePayloads(engine), set(engine.manifest.stripped)
    with writing(out) as writer:
        manifest = replace(engine.manifest, stripped=(), stripped_sources={})
        sources = ((entry, payload if entry.name in missing else kept) for entry in by_offset(manifest))
        pieces = {entry.name: (entry.offset, source(entry)) for entry, source in sources}
        hashes = _write_file(writer, pieces)
        _check_hashes(engine, hashes)
        _finish(engine, writer, replace(manifest, weights=_with_hashes(manifest.weights, hashes)))
    return open_engine(out, verify=False)


def check_strippable(engine: Engine) -> None:
    """Raises UnsupportedModelError unless the engine keeps its weights in a file of their own."""
    inside = [entry.name for entry in engine.manifest.weights if entry.file != WEIGHTS]
    if inside:
        raise UnsupportedModelError(
            f"{engine.path} is a {engine.target} engine, whose plan holds its weights inside itself",
            "a plan is made without weights only when it is built (trtllm-build --strip-plan, where the target can); "
            "engines of the onnxruntime target can be stripped at any time",
        )


def by_offset(manifest: Manifest) -> list[WeightEntry]:
    """The weights in the order of the full file."""
    return sorted(manifest.weights, key=lambda entry: entry.offset)


def write_kept(writer: EngineWriter, manifest: Manifest, payload: Payload) -> None:
    """Writes the file of the weights that `manifest` does not call stripped; none when all are."""
    entries, offsets = {entry.name: entry for entry in manifest.weights}, kept_offsets(manifest)
    if offsets:
        _write_file(writer, {name: (offset, payload(entries[name])) for name, offset in offsets.items()})


class EnginePayloads:
    """Reads the weights that an engine holds, stripped or not."""

    def __init__(self, engine: Engine) -> None:
        self._path = engine.path
        self._offsets: Mapping[str, int] = kept_offsets(engine.manifest) if is_stripped(engine.manifest) else {
            entry.name: entry.offset for entry in engine.manifest.weights
        }  # fmt: skip

    def __contains__(self, name: str) -> bool:
        return name in self._offsets

    def __call__(self, entry: WeightEntry) -> Iterator[bytes]:
        """The weight's bytes in pieces. Raises BadInputError when the file ends early."""
        with (self._path / entry.file).open("rb") as file:
            file.seek(self._offsets[entry.name])
            left = entry.nbytes
            while left:
                piece = file.read(min(left, _CHUNK))
                if not piece:
                    raise BadInputError(
                        f"{self._path / entry.file} ends within '{entry.name}'", "copy the engine again"
                    )
                left -= len(piece)
                yield piece


def _write_file(
    writer: EngineWriter, weights: Mapping[str, tuple[int, Iterable[bytes | memoryview]]]
) -> dict[str, str]:
    """Writes weights, given by rising offset, to the weights file; returns each one's sha256."""
    whole, hashes, end = hashlib.sha256(), {}, 0
    with (writer.folder / WEIGHTS).open("wb") as file:
        for name, (offset, pieces) in weights.items():
            digest = hashlib.sha256()
            for piece in _padded(offset - end):
                file.write(piece)
                whole.update(piece)
            end = offset
            for part in pieces:
                file.write(part)
                whole.update(part)
                digest.update(part)
                end += len(part) if isinstance(part, bytes) else part.nbytes
            hashes[name] = digest.hexdigest()
    writer.file_hashes[WEIGHTS] = whole.hexdigest()
    return hashes


def _padded(count: int) -> Iterator[bytes]:
    assert count >= 0, "weights overlap"
    if count:
        yield bytes(count)


def _check_hashes(engine: Engine, hashes: Mapping[str, str]) -> None:
    wrong = [entry.name for entry in engine.manifest.weights if entry.sha256 and hashes[entry.name] != entry.sha256]
    if wrong:
        raise BadInputError(
            f"{len(wrong)} weights are not those that were stripped from {engine.path}: {listed(wrong)}", _NOT_THOSE
        )


def _with_hashes(entries: Iterable[WeightEntry], hashes: Mapping[str, str]) -> tuple[WeightEntry, ...]:
    return tuple(replace(entry, sha256=hashes[entry.name]) for entry in entries)


def _finish(engine: Engine, writer: EngineWriter, manifest: Manifest) -> None:
    """Copies the other files and writes the manifest."""
    for name, entry in engine.manifest.files.items():
        if name != WEIGHTS:
            shutil.copyfile(engine.path / name, writer.folder / name)
            writer.file_hashes[name] = entry.sha256
    writer.write_json(MANIFEST, replace(manifest, files=writer.file_entries()).to_json())


def _aligned(offset: int) -> int:
    return -(-offset // KEPT_ALIGNMENT) * KEPT_ALIGNMENT
