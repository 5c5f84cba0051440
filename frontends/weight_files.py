"""Finds the weight files of a Hugging Face directory and opens their tensors, checked against the index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.checkpoints.pruned import read_pruned
from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.errors import BadInputError
from trtllm.frontends.json_files import read_json_object

_INCOMPLETE = "the download is incomplete or mixed up; fetch the model again"
_NOT_THE_MODEL = ("adapter_model", "consolidated", "training_args", "optimizer", "scheduler", "rng_state")
"""Beginnings of names of files that lie beside the model's own weights."""


@dataclass(frozen=True, eq=False)
class WeightFiles:
    """The tensors of a directory by their name in the files."""

    tensors: Mapping[str, LazyTensor]
    files: tuple[Path, ...]
    kind: str
    """What the files are, for messages: "safetensors" or "PyTorch"."""
    notes: tuple[str, ...] = field(default=())


def open_weight_files(directory: Path) -> WeightFiles:
    """The weights in the order of preference of transformers: safetensors, its index, .bin, its index.

    Raises BadInputError when there are none or the index and the files contradict each other.
    """
    for suffix, stem, kind in ((".safetensors", "model", "safetensors"), (".bin", "pytorch_model", "PyTorch")):
        single, index = directory / f"{stem}{suffix}", directory / f"{stem}{suffix}.index.json"
        if single.is_file():
            return open_files([single], kind)
        if index.is_file():
            return _open_indexed(directory, index, suffix, kind)
        others = _model_files(directory, suffix)
        if others:
            return open_files(others, kind)
    raise BadInputError(
        f"{directory} has a config.json but no weights (*.safetensors or pytorch_model*.bin)", _INCOMPLETE
    )


def open_files(files: list[Path], kind: str) -> WeightFiles:
    """All tensors of `files`; a name in two of them is an error."""
    opened = {file: _open_file(file, kind) for file in files}
    return WeightFiles(_without_duplicates(opened), tuple(files), kind)


def _model_files(directory: Path, suffix: str) -> list[Path]:
    return sorted(file for file in directory.glob(f"*{suffix}") if not file.name.startswith(_NOT_THE_MODEL))


def _open_indexed(directory: Path, index: Path, suffix: str, kind: str) -> WeightFiles:
    weight_map = _read_index(index, suffix)
    files = [directory / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise BadInputError(f"{index} names '{file.name}', which is not in {directory}", _INCOMPLETE)
    opened = {file: _open_file(file, kind) for file in files}
    for name, shard in weight_map.items():
        if name not in opened[directory / shard]:
            raise BadInputError(f"{index} puts tensor '{name}' in '{shard}', which does not hold it", _INCOMPLETE)
    tensors = _without_duplicates(opened)
    unlisted = [name for name in tensors if name not in weight_map]
    notes = (f"not in {index.name} but read from the shards: {', '.join(unlisted)}",) if unlisted else ()
    return WeightFiles(tensors, tuple(files), kind, notes)


def _read_index(index: Path, suffix: str) -> dict[str, str]:
    """The weight map; every file name in it must be a plain name of this directory."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{index} has no 'weight_map'", _INCOMPLETE)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or "\\" in shard or not shard.endswith(suffix):
            raise BadInputError(
                f"{index} puts tensor '{name}' in {shard!r}, which is no {suffix} file of the same directory",
                "an index names files beside it; do not load models from sources you do not trust",
            )
    return weight_map


def _open_file(file: Path, kind: str) -> dict[str, LazyTensor]:
    if kind == "safetensors":
        opened, pruned = SafetensorsFile(file), read_pruned(file.parent).get(file.name, {})
        return {name: pruned.get(name) or opened.tensor(name) for name in opened.specs}
    from trtllm.frontends.torch_pickle import open_torch_file

    return open_torch_file(file)


def _without_duplicates(opened: Mapping[Path, Mapping[str, LazyTensor]]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    homes: dict[str, Path] = {}
    for file, contents in opened.items():
        for name, tensor in contents.items():
            if name in tensors:
                raise BadInputError(f"tensor '{name}' is in {homes[name].name} and in {file}", _INCOMPLETE)
            tensors[name], homes[name] = tensor, file
    return tensors
