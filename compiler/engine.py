"""The engine directory: its files, its manifest, writing it in one step and checking it before use.

It knows no graph: the runtime reads engines through this module without onnx.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trtllm.errors import BadInputError, ResourceError, UsageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CONFIG = "config.json"
RECIPES = "recipes.json"
ENGINE = "rank0.engine"
WEIGHTS = "rank0.weights"
_HASH_CHUNK = 8 << 20
_SYNCED_AT_ONCE = 16


@dataclass(frozen=True)
class FileEntry:
    """A file of the directory: sha256 in hex and size in bytes."""

    sha256: str
    nbytes: int


@dataclass(frozen=True)
class WeightEntry:
    """A weight as the engine holds it; offset and size in bytes within `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    nbytes: int
    file: str
    offset: int
    quantization: str | None = None


@dataclass(frozen=True)
class ProfileEntry:
    """A range of input extents that an engine is planned for: (least, expected, most) sequences and new tokens.

    Of a cache that is read through block tables, `columns` counts the blocks of a row's table.
    """

    name: str
    batch: tuple[int, int, int]
    sequence: tuple[int, int, int]
    columns: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class TargetEntry:
    """The engine's kind, the library that made it, and the oldest that can run it."""

    name: str
    version: str
    minimum_version: str
    compute_capabilities: tuple[str, ...] = ()
    """GPU architectures that the engine was built for; empty when the library's own default was taken."""
    flavour: str = ""
    """Which of a target's libraries made it, where it has several ("tensorrt-rtx")."""
    profiles: tuple[ProfileEntry, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """manifest.json."""

    toolchain_version: str
    target: TargetEntry
    network_hash: str
    files: Mapping[str, FileEntry]
    weights: tuple[WeightEntry, ...]
    packages: Mapping[str, str] = field(default_factory=dict)
    stripped: tuple[str, ...] = ()
    """Weights that the directory does not hold; see `trtllm.compiler.stripping`."""
    stripped_sources: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the checkpoint tensors that an engine of a pruned checkpoint lacks. The hashes of the weights that are
    made of them are not known before they are put back: their entries have an empty sha256."""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "target": asdict(self.target),
            "files": {name: vars(entry) for name, entry in self.files.items()},
            "weights": [vars(entry) for entry in self.weights],
        }

    @property
    def weights_nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)


@dataclass(frozen=True, eq=False)
class Engine:
    """A checked engine directory."""

    path: Path
    manifest: Manifest
    config: Mapping[str, Any]
    """config.json: pretrained_config, build_config, target, io."""

    @property
    def target(self) -> str:
        return self.manifest.target.name

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.manifest.files.values())


def open_engine(path: str | Path, *, verify: bool = True) -> Engine:
    """Checks the manifest of an engine directory and returns the engine.

    With `verify` every file's sha256 is recomputed (about a second per gigabyte), else only sizes are compared.
    Raises BadInputError that names every file that does not match.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BadInputError(f"{folder} is not an engine directory", "give the --output-dir of a trtllm-build")
    manifest = _read_manifest(folder)
    problems = [
        problem
        for name, entry in manifest.files.items()
        for problem in _file_problems(folder / name, entry, verify=verify)
    ]
    if problems:
        raise BadInputError(
            f"{folder} does not match its manifest: {'; '.join(problems)}",
            "the engine was damaged or edited after it was built; copy it again or rebuild it",
        )
    config = _read_json(folder / CONFIG)
    return Engine(folder, manifest, config)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.exists():
        raise BadInputError(
            f"{folder} has no {MANIFEST}", "it is not an engine directory; give the --output-dir of a trtllm-build"
        )
    data = _read_json(path)
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise BadInputError(
            f"{path} has format version {version!r}, this version reads {FORMAT_VERSION}",
            "rebuild the engine with this version, or load it with the version that built it",
        )
    try:
        return Manifest(
            toolchain_version=data["toolchain_version"],
            target=_target_entry(data["target"]),
            network_hash=data["network_hash"],
            files={_safe_name(name): FileEntry(**entry) for name, entry in data["files"].items()},
            weights=tuple(WeightEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in data["weights"]),
            packages=data.get("packages", {}),
            stripped=tuple(data.get("stripped", ())),
            stripped_sources=data.get("stripped_sources", {}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"{path} is not a manifest: {error}", "rebuild the engine") from None


def _target_entry(data: Mapping[str, Any]) -> TargetEntry:
    profiles = tuple(
        ProfileEntry(
            entry["name"], tuple(entry["batch"]), tuple(entry["sequence"]), tuple(entry.get("columns", (0, 0, 0)))
        )
        for entry in data.get("profiles", ())
    )
    capabilities = tuple(data.get("compute_capabilities", ()))
    return TargetEntry(**{**data, "compute_capabilities": capabilities, "profiles": profiles})


def _safe_name(name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise BadInputError(f"{MANIFEST} names '{name}', which is outside the engine directory", "rebuild the engine")
    return name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(f"{path} is missing", "the engine directory is incomplete; rebuild it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadInputError(f"{path} cannot be read: {error}", "rebuild the engine") from None
    if not isinstance(data, dict):
        raise BadInputError(f"{path} holds no JSON object", "rebuild the engine")
    return data


def _file_problems(path: Path, entry: FileEntry, *, verify: bool) -> Iterator[str]:
    if not path.is_file():
        yield f"{path.name} is missing"
    elif (size := path.stat().st_size) != entry.nbytes:
        yield f"{path.name} has {size} bytes, expected {entry.nbytes}"
    elif verify and (found := file_sha256(path)) != entry.sha256:
        yield f"{path.name} has sha256 {found[:12]}..., expected {entry.sha256[:12]}..."


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def json_lines(data: Mapping[str, Any]) -> str:
    """A JSON object with a line for each of its items, and for each item of those that have several.

    Every line is made by json's C encoder, which does not indent: large recipes and manifests take milliseconds.
    """
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(data[key])}" for key in sorted(data)) + "\n}\n"


def _lines(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        items = (f" {json.dumps(key)}: {json.dumps(value[key], sort_keys=True)}" for key in sorted(value))
        return "{\n" + ",\n".join(items) + "\n}"
    if isinstance(value, list | tuple) and value:
        return "[\n" + ",\n".join(f" {json.dumps(item, sort_keys=True)}" for item in value) + "\n]"
    return json.dumps(value)


class EngineWriter:
    """Writes an engine directory in one step: a temporary sibling becomes `path` when everything is on disk.

    Use `writing(path)`. `file_hashes` may hold hashes computed while a file was written.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.folder = folder
        self.file_hashes: dict[str, str] = {}

    def write_json(self, name: str, data: Any) -> None:
        (self.folder / name).write_text(json_lines(data), encoding="utf-8")

    def write_bytes(self, name: str, data: bytes) -> None:
        _safe_name(name)
        (self.folder / name).write_bytes(data)

    def file_entries(self) -> dict[str, FileEntry]:
        """An entry for every file written so far."""
        return {
            path.name: FileEntry(self.file_hashes.get(path.name) or file_sha256(path), path.stat().st_size)
            for path in sorted(self.folder.iterdir())
            if path.is_file()
        }


@contextlib.contextmanager
def writing(path: Path) -> Iterator[EngineWriter]:
    """A writer whose directory appears at `path` when the block ends well, and leaves nothing when it fails.

    Raises UsageError when `path` exists before or after, ResourceError when the disk is full.
    """
    path = path.absolute()
    check_free(path)
    sweep(path)
    folder = path.with_name(f".{path.name}.partial-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield EngineWriter(path, folder)
        _sync(folder)
        check_free(path)  # another build may have been faster
        os.rename(folder, path)
        _sync_one(path.parent)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _disk_error(error, path) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_free(path: Path) -> None:
    """Raises UsageError when something that is not an empty directory exists at `path`."""
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} exists", "choose another --output-dir, or remove it first")


def sweep(path: Path) -> None:
    """Removes what killed builds of the same directory left behind."""
    for leftover in path.parent.glob(f".{path.name}.partial-*"):
        process = leftover.name.rsplit("-", 2)[-2]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    """Everything within is on the disk. All at once: the file system commits them together, not one after the other."""
    paths = [folder, *folder.rglob("*")]
    with ThreadPoolExecutor(min(len(paths), _SYNCED_AT_ONCE), thread_name_prefix="sync") as pool:
        for _ in pool.map(_sync_one, paths):
            pass


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(error: OSError, path: Path) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(
            f"the disk is full: {path.parent} has {shutil.disk_usage(path.parent).free >> 20} MiB left",
            "free space, or choose an --output-dir on another disk; nothing was left behind",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return UsageError(f"cannot write {path}: {error.strerror}", "choose another --output-dir")
    return error
