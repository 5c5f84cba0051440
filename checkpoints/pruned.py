"""Tensors whose payload was taken out of a checkpoint: their shape, type and hash remain in its manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor, TensorSpec
from trtllm.dtypes import DType
from trtllm.errors import BadInputError

CHECKPOINT_MANIFEST = "checkpoint_manifest.json"
"""Hashes of a checkpoint's files and tensors; not `manifest.json`, which makes a directory an engine."""
PRUNED = "is_pruned"
"""The key of config.json that says so, as in the reference."""


@dataclass(frozen=True, eq=False)
class PrunedTensor:
    """A tensor that was taken out; `sha256` of its payload in hex, "" where it is a part of one that was hashed."""

    spec: TensorSpec
    sha256: str

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        _refuse(self.spec.name)


def _refuse(name: str) -> NoReturn:
    raise BadInputError(
        f"the payload of '{name}' was pruned from the checkpoint",
        "put it back: trtllm-prune PATH --restore SOURCE --output-dir DIR",
    )


def pruned_view(spec: TensorSpec, sha256: str = "") -> PrunedTensor:
    """A tensor that is pruned because what it is made of is."""
    return PrunedTensor(spec, sha256)


def is_pruned_tensor(tensor: LazyTensor) -> bool:
    return isinstance(tensor, PrunedTensor)


def pruned_hashes(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """sha256 of the pruned tensors among `tensors`, where it is known."""
    return {
        name: tensor.sha256 for name, tensor in tensors.items() if isinstance(tensor, PrunedTensor) and tensor.sha256
    }


def read_pruned(directory: Path) -> dict[str, dict[str, PrunedTensor]]:
    """The pruned tensors of each file of a checkpoint, by name; empty for a checkpoint that is whole.

    Raises BadInputError for a damaged manifest.
    """
    path = directory / CHECKPOINT_MANIFEST
    if not path.is_file():
        return {}
    try:
        section: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("pruned", {})
        return {
            file: {name: _entry(name, entry) for name, entry in entries.items()} for file, entries in section.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"{path} is damaged: {error}", "copy the checkpoint again") from None


def _entry(name: str, entry: Mapping[str, Any]) -> PrunedTensor:
    return PrunedTensor(TensorSpec(name, tuple(entry["shape"]), DType.of(entry["dtype"])), str(entry["sha256"]))
