"""What a user gives for the new weights: a model in any form, some tensors of one, or an adapter with its base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint, FunctionTensor, LazyTensor, TensorSpec
from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.compiler.refit.adapter import CONFIG as ADAPTER_CONFIG
from trtllm.compiler.refit.adapter import read_adapter
from trtllm.dtypes import DType
from trtllm.errors import BadInputError, UsageError
from trtllm.frontends.canonical_names import canonical_tensors
from trtllm.progress import Progress

Kind = Literal["checkpoint", "tensors", "adapter"]


@dataclass(frozen=True, eq=False)
class Given:
    """The tensors to take, under the Hugging Face names, and where they come from."""

    kind: Kind
    source: str
    tensors: Mapping[str, LazyTensor]
    """All that may be read: with a base its tensors too."""
    new: frozenset[str]
    """Names of those that were given; the rest is the base's."""
    checkpoint: Checkpoint | None
    """The model they are of: the one given, or an adapter's base with the adapter merged. None for bare tensors."""
    is_complete: bool
    """Whether every weight is to be made from them. Otherwise weights of which nothing is given stay as they are."""
    base: Checkpoint | None = None
    strength: float = 1.0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def identity(self) -> dict[str, Any]:
        """Where the weights come from, for the engine's records."""
        files = _weight_files(self.source)
        return {
            "kind": self.kind,
            "source": self.source,
            "base": self.base.source if self.base is not None else None,
            "strength": self.strength,
            "files": {path.name: path.stat().st_size for path in files},
        }


def open_given(
    model: Any, architecture: str, *, base: Any = None, strength: float = 1.0, partial: bool = False,
    known_tokenizer: Path | None = None, progress: Progress,
) -> Given:  # fmt: skip
    """Reads headers of whatever was given. `architecture` is the engine's, for tensors that come without a config;
    `known_tokenizer` is its tokenizer, which need not be checked again where it is found.

    Raises BadInputError and UnsupportedModelError for what cannot be read, UsageError for what does not go together.
    """
    from trtllm.frontends.detect import open_model

    base_checkpoint = (
        open_model(base, known_tokenizer=known_tokenizer, notify=progress.note) if base is not None else None
    )
    path = Path(model).expanduser() if isinstance(model, str | Path) else None
    if path is not None and (path / ADAPTER_CONFIG).is_file():
        return _adapter(path, base_checkpoint, strength)
    if strength != 1.0:
        raise UsageError("--strength goes with a LoRA adapter", "leave it out for a checkpoint")
    if isinstance(model, Mapping):
        return _tensors("tensors in memory", _named(_from_memory(model), architecture), base_checkpoint)
    if path is not None and path.is_file() and path.suffix == ".safetensors" and not _has_config(path):
        file = SafetensorsFile(path)
        return _tensors(
            str(path), _named({name: file.tensor(name) for name in file.specs}, architecture), base_checkpoint
        )
    checkpoint = open_model(model, known_tokenizer=known_tokenizer, notify=progress.note)
    if partial or base_checkpoint is not None:
        merged = {**(base_checkpoint.tensors if base_checkpoint else {}), **checkpoint.tensors}
        whole = replace(checkpoint, tensors=merged)
        return Given(
            "checkpoint", checkpoint.source, merged, frozenset(checkpoint.tensors), whole, False, base_checkpoint
        )
    return Given("checkpoint", checkpoint.source, checkpoint.tensors, frozenset(checkpoint.tensors), checkpoint, True)


def _adapter(path: Path, base: Checkpoint | None, strength: float) -> Given:
    adapter = read_adapter(path)
    if base is None:
        named = f" (its config names {adapter.base_name})" if adapter.base_name else ""
        raise UsageError(f"{path} is a LoRA adapter, which is merged into its base{named}", "give it: --base MODEL")
    merged, problems = adapter.merged(base.tensors, strength)
    tensors = {**base.tensors, **merged}
    notes = [f"LoRA adapter of {len(merged)} tensors, merged at strength {strength:g}"]
    if adapter.base_name and Path(adapter.base_name).name != Path(base.source).name:
        notes.append(f"the adapter names {adapter.base_name} as its base, {base.source} is given")
    return Given(
        "adapter", str(path), tensors, frozenset(merged), replace(base, tensors=tensors), True, base, strength,
        tuple(problems), tuple(notes),
    )  # fmt: skip


def _tensors(source: str, tensors: Mapping[str, LazyTensor], base: Checkpoint | None) -> Given:
    merged = {**(base.tensors if base else {}), **tensors}
    whole = replace(base, tensors=merged) if base is not None else None
    return Given("tensors", source, merged, frozenset(tensors), whole, False, base)


def _named(tensors: dict[str, LazyTensor], architecture: str) -> Mapping[str, LazyTensor]:
    found = canonical_tensors(tensors, architecture, "the tensors").tensors
    if not found:
        raise BadInputError("no tensor of a text model is given", "use the names of the Hugging Face model")
    return found


def _from_memory(given: Mapping[str, Any]) -> dict[str, LazyTensor]:
    return {str(name): _lazy(str(name), value) for name, value in given.items()}


def _lazy(name: str, value: Any) -> LazyTensor:
    if hasattr(value, "detach"):
        from trtllm.frontends.torch_tensors import lazy_torch_tensor

        return lazy_torch_tensor(name, value.detach())
    if not isinstance(value, np.ndarray):
        raise UsageError(f"'{name}' is a {type(value).__name__}", "give numpy arrays or torch tensors by name")
    try:
        dtype = DType.of(str(value.dtype))
    except ValueError:
        raise UsageError(
            f"'{name}' has element type {value.dtype}", "float32, float16 and bfloat16 are usual"
        ) from None
    array = np.ascontiguousarray(value)
    return FunctionTensor(TensorSpec(name, array.shape, dtype), lambda a, b: array[a:b].copy() if array.ndim else array)


def _has_config(path: Path) -> bool:
    return (path.parent / "config.json").is_file()


def _weight_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    return sorted(file for pattern in ("*.safetensors", "*.bin", "*.gguf") for file in path.glob(pattern))
