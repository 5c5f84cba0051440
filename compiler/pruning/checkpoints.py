"""Takes payloads out of a checkpoint directory and puts them back, verified by hash.

A pruned tensor stays in its file as one of shape [0], as the reference writes it; `checkpoint_manifest.json` keeps its
shape, type and sha256, and config.json says `is_pruned`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.pruned import CHECKPOINT_MANIFEST, PRUNED, PrunedTensor, is_pruned_tensor, read_pruned
from trtllm.checkpoints.recipes import Cast
from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.checkpoints.safetensors_writer import StoredTensor, write_safetensors
from trtllm.checkpoints.trtllm_config import is_tied
from trtllm.checkpoints.trtllm_shards import Shard
from trtllm.checkpoints.trtllm_tensors import full_tensors
from trtllm.compiler.conversion import (
    ShardChunks,
    checked_layout,
    spec_of,
    tensors_by_rank,
    without_tied_head,
    write_checkpoint_manifest,
)
from trtllm.compiler.engine import EngineWriter, writing
from trtllm.dtypes import DType
from trtllm.errors import BadInputError, UnsupportedModelError, UsageError, listed
from trtllm.progress import Progress

_ROWS = 1024


@dataclass(frozen=True, eq=False)
class CheckpointFiles:
    """The safetensors files of a directory and the tensors in them, those that are pruned too."""

    path: Path
    files: Mapping[str, Mapping[str, LazyTensor]]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that are there; ranks repeat names."""
        return {
            name: tensor.spec.shape
            for tensors in self.files.values()
            for name, tensor in tensors.items()
            if not is_pruned_tensor(tensor)
        }

    @property
    def is_pruned(self) -> bool:
        return any(is_pruned_tensor(tensor) for tensors in self.files.values() for tensor in tensors.values())

    @property
    def nbytes(self) -> int:
        return sum((self.path / name).stat().st_size for name in self.files)


def open_checkpoint_files(path: Path) -> CheckpointFiles:
    """Raises UnsupportedModelError for weights in other files than safetensors."""
    if not (path / "config.json").is_file():
        raise BadInputError(f"{path} is no checkpoint: it has no config.json", "give a model directory or an engine")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UnsupportedModelError(
            f"{path} holds no safetensors files, and weights of other formats cannot be taken out",
            "convert it first: trtllm-convert MODEL --output-dir DIR",
        )
    pruned = read_pruned(path)
    opened = {file.name: SafetensorsFile(file) for file in files}
    return CheckpointFiles(
        path,
        {
            name: {key: pruned.get(name, {}).get(key) or file.tensor(key) for key in file.specs}
            for name, file in opened.items()
        },
    )


def strip_checkpoint(files: CheckpointFiles, out: Path, names: tuple[str, ...], progress: Progress) -> None:
    """Writes the checkpoint without the payloads of `names` to `out`; what is pruned already stays so."""
    chosen = set(names)
    with writing(out) as writer:
        progress.stage("writing the checkpoint", files.nbytes)
        entries: dict[str, dict[str, Any]] = {}
        written = {}
        for file, tensors in files.files.items():
            entries[file] = {
                name: _entry(tensor) for name, tensor in tensors.items() if name in chosen or is_pruned_tensor(tensor)
            }
            stored = [_stored(tensor, pruned=name in entries[file]) for name, tensor in tensors.items()]
            written[file] = write_safetensors(writer.folder / file, stored, progress)
            writer.file_hashes[file] = written[file].sha256
        copy_others(files, writer, pruned=True)
        write_checkpoint_manifest(writer, str(files.path), written, pruned=entries)


def restore_checkpoint(files: CheckpointFiles, out: Path, source: str, progress: Progress) -> int:
    """Writes the checkpoint with its pruned payloads taken from `source`; returns how many.

    Raises BadInputError that names the tensors that `source` lacks or whose hash is another.
    """
    missing = [tensor for tensors in files.files.values() for tensor in tensors.values() if is_pruned_tensor(tensor)]
    if not missing:
        raise UsageError(f"{files.path} is not pruned", "there is nothing to restore")
    found = _sources(files, source)
    with writing(out) as writer:
        progress.stage("restoring the checkpoint")
        wrong, written = [], {}
        for file, tensors in files.files.items():
            stored = []
            for name, tensor in tensors.items():
                given = found[file].get(name) if is_pruned_tensor(tensor) else _stored(tensor, pruned=False)
                if given is None or given.spec != tensor.spec:
                    wrong.append(name)
                else:
                    stored.append(given)
            if not wrong:
                written[file] = write_safetensors(writer.folder / file, stored, progress)
                wrong += [
                    name
                    for name, tensor in tensors.items()
                    if isinstance(tensor, PrunedTensor) and written[file].tensors[name] != tensor.sha256
                ]
                writer.file_hashes[file] = written[file].sha256
        if wrong:
            raise BadInputError(
                f"{len(wrong)} tensors of {source} are not those that were pruned from {files.path}: {listed(wrong)}",
                "restore from the checkpoint that was pruned",
            )
        copy_others(files, writer, pruned=False)
        write_checkpoint_manifest(writer, str(files.path), written)
    return len(missing)


def copy_others(files: CheckpointFiles, writer: EngineWriter, *, pruned: bool) -> None:
    """Copies what is no weights, with config.json saying whether payloads are missing."""
    for path in sorted(files.path.iterdir()):
        if path.name in files.files or path.name in (CHECKPOINT_MANIFEST, "config.json") or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, writer.folder / path.name)
        elif path.suffix not in (".bin", ".pt", ".pth", ".gguf"):
            shutil.copyfile(path, writer.folder / path.name)
    config = json.loads((files.path / "config.json").read_text(encoding="utf-8"))
    config.pop(PRUNED, None)
    writer.write_bytes(
        "config.json", (json.dumps(config | ({PRUNED: True} if pruned else {}), indent=2) + "\n").encode()
    )


def _entry(tensor: LazyTensor) -> dict[str, Any]:
    if isinstance(tensor, PrunedTensor):
        sha256 = tensor.sha256
    else:
        digest = hashlib.sha256()
        for chunk in _chunks(tensor):
            digest.update(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
        sha256 = digest.hexdigest()
    return {"shape": list(tensor.spec.shape), "dtype": tensor.spec.dtype.value, "sha256": sha256}


def _stored(tensor: LazyTensor, *, pruned: bool) -> StoredTensor:
    if pruned:
        return StoredTensor(TensorSpec(tensor.spec.name, (0,), tensor.spec.dtype), lambda: ())
    return StoredTensor(tensor.spec, lambda: _chunks(tensor))


def _chunks(tensor: LazyTensor) -> Iterator[np.ndarray]:
    if not tensor.spec.shape:
        yield tensor.read()
        return
    rows = tensor.spec.shape[0]
    for start in range(0, rows, _ROWS):
        yield tensor.read(start, min(start + _ROWS, rows))


def _sources(files: CheckpointFiles, source: str) -> dict[str, dict[str, StoredTensor]]:
    """What `source` has for each file: by the same names in files, else through the names of Hugging Face."""
    from trtllm.frontends.detect import open_model

    folder = Path(source)
    if folder.is_dir() and all((folder / name).is_file() for name in files.files):
        others = open_checkpoint_files(folder).files
        return {
            file: {
                name: _stored(tensor, pruned=False)
                for name, tensor in others[file].items()
                if not is_pruned_tensor(tensor)
            }
            for file in files.files
        }
    checkpoint = open_model(source)
    if "rank0.safetensors" not in files.files:
        named = {name: _stored(tensor, pruned=False) for name, tensor in checkpoint.tensors.items()}
        return dict.fromkeys(files.files, named)
    return _converted(files, checkpoint)


def _converted(files: CheckpointFiles, checkpoint: Any) -> dict[str, dict[str, StoredTensor]]:
    """The ranks' tensors of the model `checkpoint`, in the types of the pruned ones."""
    config = json.loads((files.path / "config.json").read_text(encoding="utf-8"))
    mapping = config["mapping"]
    layout = checked_layout(
        checkpoint, mapping["tp_size"], mapping["pp_size"], parallel_embedding=config["use_parallel_embedding"]
    )
    reader = RecipeReader(checkpoint.tensors)
    tensors = full_tensors(without_tied_head(checkpoint), layout, checkpoint.source)
    tied = is_tied(checkpoint.architecture, checkpoint.config)
    result: dict[str, dict[str, StoredTensor]] = {}
    for rank, shards in enumerate(tensors_by_rank(tensors, layout, tied=tied)):
        wanted = files.files.get(f"rank{rank}.safetensors", {})
        result[f"rank{rank}.safetensors"] = {
            name: _shard(name, shard, wanted[name].spec.dtype, reader) for name, shard in shards if name in wanted
        }
    return result


def _shard(name: str, shard: Shard, dtype: DType, reader: RecipeReader) -> StoredTensor:
    if shard.recipe is not None and shard.recipe.dtype is not dtype:
        shard = replace(shard, recipe=Cast(shard.recipe, dtype))
    return StoredTensor(spec_of(name, shard), ShardChunks(reader, shard))
