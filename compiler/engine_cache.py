"""Engines of models that were built before, kept in the user's cache folder and found again by what they are made of.

A record is found by the network's hash, the weights' hash, the tokenizer's files, the build's options and the versions
of everything that had a part. One of the same network and options with other weights is refitted, not built.
`<root>/<key>/engine` is the engine directory, `<key>/used` is locked while a process has the engine open and its time
tells the last use, `<key>.lock` is locked by whoever looks up, builds or removes, `<key>/network` says what engines
share that differ in their weights alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trtllm import __version__
from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.compiler.engine import FORMAT_VERSION, Engine, file_sha256, open_engine
from trtllm.compiler.pipeline import Prepared, finish_build, prepare_build
from trtllm.compiler.pipeline import compile as compile_engine
from trtllm.compiler.plan import check_plan
from trtllm.config import BuildConfig
from trtllm.environment import cache_root as default_cache_root
from trtllm.errors import BadInputError
from trtllm.progress import Progress, Silent

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
_HASH_ROWS_BYTES = 64 << 20
_SETTLED_SECONDS = 2.0
"""A file that changed less than this ago may change again without another time; its hash is not remembered."""


def cached_engine(
    model: str | Path | object,
    build: BuildConfig,
    *,
    cache_root: str | Path | None = None,
    max_records: int = 10,
    max_cache_storage_gb: float = 256.0,
    tokenizer: object | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Engine:
    """The engine of a model, from the cache or built into it.

    Args:
        model, tokenizer, progress: as `trtllm.compile` takes them; the progress is told whether it was found, refitted
            or built.
        cache_root: the folder of the cache; $TRTLLM_CACHE/engines or the user's cache folder by default.
        max_records, max_cache_storage_gb: what is kept; the least recently used engines go first, and none that a
            process has open.
        verify: recompute the hashes of an engine that is found; one that does not match is built again.

    The engine stays in the cache at least as long as the returned object lives. Processes that ask for the same engine
    at once build it once. Raises what `trtllm.compile` raises.
    """
    progress = progress or Silent()
    root = Path(cache_root).expanduser() if cache_root is not None else default_cache_root() / "engines"
    root.mkdir(parents=True, exist_ok=True)
    prepared = prepare_build(model, build, root / f".new-{uuid.uuid4().hex}", tokenizer=tokenizer, progress=progress)
    key = _key(prepared, _weights_hash(model, prepared.checkpoint, root))
    with _locked(root / f"{key}.lock", progress):
        engine = _stored(root / key, verify, progress)
        engine = engine or _refitted(root, key, prepared, progress) or _built(root / key, prepared, progress)
        _note_network(root / key, prepared)
        _hold(engine, root / key)
    _evict(root, max_records, int(max_cache_storage_gb * 1e9), keep=key)
    return engine


def _key(prepared: Prepared, weights_hash: str) -> str:
    compiled, checkpoint = prepared.compiled, prepared.checkpoint
    parts = {
        "network": compiled.network_hash,
        "weights": weights_hash,
        "recipes": {weight.name: weight.recipe.to_json() for weight in compiled.weights},
        "assets": {name: _content_hash(content) for name, content in checkpoint.assets.items()},
        "config": dict(checkpoint.config) | {"architecture": checkpoint.architecture},
        "build": compiled.build.model_dump(mode="json"),
        "versions": [FORMAT_VERSION, __version__, compiled.target.library_version()],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


def _content_hash(content: bytes | Path) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else file_sha256(content)


def _stored(record: Path, verify: bool, progress: Progress) -> Engine | None:
    """The engine of a record; None, and no record any more, when it does not hold together."""
    if not record.exists():
        return None
    try:
        engine = open_engine(record / "engine", verify=verify)
    except BadInputError as error:
        progress.note(f"the cached engine is built again: {error.what}")
        _remove(record)
        return None
    progress.note(f"engine from the cache: {engine.path}")
    return engine


def _refitted(root: Path, key: str, prepared: Prepared, progress: Progress) -> Engine | None:
    """The engine, made of a cached one that has the same network and other weights; None when there is none."""
    from trtllm.compiler.refit.refit import refit_built

    network = _network_key(prepared)
    for path in sorted(root.glob("*/network"), key=lambda path: path.stat().st_mtime, reverse=True):
        record = path.parent
        with contextlib.suppress(OSError, BadInputError), _held(record) as is_free:
            if not is_free or record.name == key or path.read_text(encoding="utf-8") != network:
                continue
            begun = time.monotonic()
            other = open_engine(record / "engine", verify=False)
            check_plan(prepared.plan)
            (root / key).mkdir(exist_ok=True)
            try:
                engine = refit_built(other, prepared.checkpoint, prepared.compiled, root / key / "engine", progress)
            except BaseException:
                _remove(root / key)
                raise
            progress.note(f"engine refitted in {time.monotonic() - begun:.1f} s from {record.name}: {engine.path}")
            return engine
    return None


@contextlib.contextmanager
def _held(record: Path) -> Iterator[bool]:
    """Keeps a record from being removed meanwhile; False when somebody else is at it."""
    descriptor = os.open(record.with_name(f"{record.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _network_key(prepared: Prepared) -> str:
    """What engines share that differ in their weights alone."""
    compiled = prepared.compiled
    parts = [
        compiled.network_hash,
        compiled.build.model_dump(mode="json"),
        FORMAT_VERSION, __version__, compiled.target.library_version(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _note_network(record: Path, prepared: Prepared) -> None:
    (record / "network").write_text(_network_key(prepared), encoding="utf-8")


def _built(record: Path, prepared: Prepared, progress: Progress) -> Engine:
    begun = time.monotonic()
    record.mkdir(exist_ok=True)
    try:
        engine = finish_build(prepared, record / "engine", progress=progress)
    except BaseException:
        _remove(record)
        raise
    progress.note(f"engine built in {time.monotonic() - begun:.1f} s: {engine.path}")
    return engine


def _hold(engine: Engine, record: Path) -> None:
    """Marks the record as used now, and as in use for as long as the engine object lives."""
    descriptor = os.open(record / "used", os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.utime(record / "used")
    weakref.finalize(engine, os.close, descriptor)


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _try_lock(descriptor):
            progress.note("waiting for another process that builds the same engine")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _evict(root: Path, max_records: int, max_bytes: int, *, keep: str) -> None:
    """Removes the least recently used records until the rest is within the limits."""
    used = {path.parent: path.stat().st_mtime_ns for path in root.glob("*/used")}
    sizes = {record: _size(record) for record in used}
    for record in sorted(used, key=lambda record: used[record]):
        if len(sizes) <= max_records and sum(sizes.values()) <= max_bytes:
            return
        if record.name != keep and _remove_unused(record):
            del sizes[record]


def _remove_unused(record: Path) -> bool:
    """Removes a record that nobody builds or has open."""
    with contextlib.ExitStack() as descriptors:
        for path in (record.with_name(f"{record.name}.lock"), record / "used"):
            try:
                descriptor = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                return not record.exists()
            descriptors.callback(os.close, descriptor)
            if not _try_lock(descriptor):
                return False
        _remove(record)
    return True


def _remove(record: Path) -> None:
    """Takes the record away in one step; those who have its files open keep them."""
    trash = record.with_name(f".removed-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(record, trash)
    shutil.rmtree(trash, ignore_errors=True)


def _size(record: Path) -> int:
    return sum(path.stat().st_size for path in record.rglob("*") if path.is_file())


def _weights_hash(model: str | Path | object, checkpoint: Checkpoint, root: Path) -> str:
    """A hash of the payloads: of the files that hold them, or of the tensors themselves for a model in memory."""
    files = _weight_files(model, checkpoint)
    if not files:
        return _tensors_hash(checkpoint)
    known = _FileHashes(root / "file-hashes.json")
    digests = [f"{path.name} {known.of(path)}" for path in files]
    known.save()
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _weight_files(model: str | Path | object, checkpoint: Checkpoint) -> list[Path]:
    """The files in a model's folder that can hold weights; of a GGUF file the file and its other parts."""
    if not isinstance(model, str | Path):
        return []
    path = Path(model).expanduser()
    if path.is_file() and path.name != "config.json":
        prefix = path.stem.split("-0")[0]
        return sorted({path, *path.parent.glob(f"{prefix}*{path.suffix}")}) if "-of-" in path.stem else [path]
    folders = (
        {path}
        if path.is_dir()
        else {content.parent for content in checkpoint.assets.values() if isinstance(content, Path)}
    )
    return sorted({file for folder in folders for pattern in _WEIGHT_FILES for file in folder.glob(pattern)})


def _tensors_hash(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(str(tensor.spec).encode() + name.encode())
        rows = tensor.spec.shape[0] if tensor.spec.shape else 1
        step = max(1, _HASH_ROWS_BYTES * rows // max(tensor.spec.nbytes, 1))
        for start in range(0, rows, step):
            digest.update(tensor.read(start, min(start + step, rows)).tobytes())
    return digest.hexdigest()


class _FileHashes:
    """sha256 of files by path, size, inode and time of change, so that gigabytes are read once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Mapping[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError):
            self._known = dict(json.loads(path.read_text(encoding="utf-8")))

    def of(self, path: Path) -> str:
        path = path.resolve()
        before = self._identity(path)
        entry = self._known.get(str(path))
        if entry is not None and entry.get("identity") == before:
            return str(entry["sha256"])
        digest = file_sha256(path)
        if before == self._identity(path) and time.time() - path.stat().st_mtime > _SETTLED_SECONDS:
            self._known[str(path)] = {"identity": before, "sha256": digest}
        return digest

    def save(self) -> None:
        kept = {path: entry for path, entry in self._known.items() if os.path.exists(path)}
        temporary = self._path.with_name(f".{self._path.name}-{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(kept, indent=1, sort_keys=True), encoding="utf-8")
        os.replace(temporary, self._path)

    def _identity(self, path: Path) -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def build_engine_uncached(
    model: str | Path | object, build: BuildConfig, *, tokenizer: object | None = None, progress: Progress | None = None
) -> Engine:
    """The engine of a model in a temporary folder, for as long as the returned object lives."""
    return compile_engine(model, config=build, tokenizer=tokenizer, progress=progress)
