"""Reads a transformers model that is already in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm.checkpoints.checkpoint import Checkpoint, LazyTensor
from trtllm.errors import UsageError
from trtllm.frontends.canonical_names import canonical_tensors
from trtllm.frontends.huggingface import dtype_summary, ignored_notes
from trtllm.frontends.model_assets import collect_assets
from trtllm.frontends.text_config import find_text_config
from trtllm.frontends.torch_tensors import lazy_torch_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_model(model: Any, *, tokenizer: Any = None) -> Checkpoint:
    """A checkpoint whose tensors are the model's own: rows are copied when they are read.

    The model may be on any device; it must not be trained while the checkpoint is in use. `tokenizer` is its
    transformers tokenizer, for the engine's tokenizer files. Raises UsageError for any other object.
    """
    if not hasattr(model, "state_dict") or not hasattr(getattr(model, "config", None), "to_dict"):
        raise UsageError(
            f"a {type(model).__module__}.{type(model).__qualname__} is no model",
            "pass a path, a hub id, or a transformers model",
        )
    source = type(model).__name__
    config = {**model.config.to_dict(), "architectures": [source]}
    text = find_text_config(_with_dtype_names(config, str(model.dtype)), source)
    if text.quantization is not None:
        raise text.quantization.unsupported("a model in memory")
    canonical = canonical_tensors(_weights(model), text.architecture, source)
    found = (
        f"transformers model in memory, {text.architecture}, "
        f"{len(canonical.tensors)} tensors, {dtype_summary(canonical.tensors)}"
    )
    assets, asset_notes = _assets(model, tokenizer)
    notes = (found, *ignored_notes(canonical, text), *asset_notes)
    return Checkpoint("transformers", source, text.architecture, text.config, canonical.tensors, assets, notes)


def _weights(model: PreTrainedModel) -> dict[str, LazyTensor]:
    """The state dict without the second name of a tied weight; the name that a saved model keeps comes first."""
    tied = _tied_names(model)
    homes: dict[int, str] = {}
    result: dict[str, LazyTensor] = {}
    for name, tensor in sorted(model.state_dict().items(), key=lambda item: item[0] in tied):
        address = tensor.data_ptr() if tensor.numel() else id(tensor)
        if name in tied and address in homes:
            continue
        homes.setdefault(address, name)
        result[name] = lazy_torch_tensor(name, tensor)
    return result


def _tied_names(model: PreTrainedModel) -> set[str]:
    """Names that the class declares as tied: transformers 4 lists them, 5 maps them to the name they are tied to."""
    declared = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()
    return set(declared)


def _with_dtype_names(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """torch dtypes as their names, as config.json has them; a model that was never saved names none: `dtype` is its."""
    named: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key == "text_config":
            named[key] = _with_dtype_names(value, dtype)
        elif key in ("dtype", "torch_dtype"):
            named[key] = str(value or dtype).removeprefix("torch.")
        else:
            named[key] = value
    return named


def _assets(model: object, tokenizer: Any) -> tuple[dict[str, bytes | Path], tuple[str, ...]]:
    """The files that save_pretrained writes for the tokenizer and the generation config, as bytes."""
    with tempfile.TemporaryDirectory() as folder:
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            (Path(folder) / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        found = collect_assets(Path(folder))
        files: dict[str, bytes | Path] = {
            name: content.read_bytes() if isinstance(content, Path) else content
            for name, content in found.files.items()
        }
    return files, found.notes
