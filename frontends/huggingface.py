"""Reads a Hugging Face model directory: config.json, safetensors or PyTorch weights, tokenizer files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from trtllm.checkpoints.checkpoint import Checkpoint, LazyTensor
from trtllm.errors import BadInputError
from trtllm.frontends.canonical_names import CanonicalTensors, canonical_tensors
from trtllm.frontends.json_files import read_json_object
from trtllm.frontends.model_assets import collect_assets
from trtllm.frontends.quantized.config import QuantizationConfig
from trtllm.frontends.text_config import TextConfig, find_text_config
from trtllm.frontends.weight_files import WeightFiles, open_files, open_weight_files


def read_directory(directory: Path, *, source: str = "", known_tokenizer: Path | None = None) -> Checkpoint:
    """The model in `directory`; `source` is what the user called it, for messages.

    A tokenizer.json that equals `known_tokenizer` is not checked again.

    Quantized weights read as float32 and keep what they are stored as. Raises BadInputError for damaged or
    contradicting files, UnsupportedModelError for a quantization that is not read.
    """
    source = source or str(directory)
    text = _read_config(directory, source)
    return _checkpoint(directory, source, text, open_weight_files(directory), known_tokenizer)


def read_file(file: Path, kind: str) -> Checkpoint:
    """The model whose only weights are `file` ("safetensors" or "PyTorch"), with the files beside it."""
    if not (file.parent / "config.json").is_file():
        raise BadInputError(
            f"there is no config.json beside {file}", "weights alone do not tell their model; pass its directory"
        )
    text = _read_config(file.parent, str(file))
    return _checkpoint(file.parent, str(file), text, open_files([file], kind))


def _read_config(directory: Path, source: str) -> TextConfig:
    text = find_text_config(read_json_object(directory / "config.json"), source)
    modelopt = directory / "hf_quant_config.json"
    if not modelopt.is_file():
        return text
    quantization = read_json_object(modelopt).get("quantization")
    if not isinstance(quantization, dict):
        raise BadInputError(f"{modelopt} has no 'quantization'", "the file is damaged; fetch the model again")
    stated = text.quantization
    if stated is not None and stated.method != "modelopt":
        raise BadInputError(
            f"config.json of {source} says quantization method '{stated.method}', {modelopt.name} says modelopt",
            "two quantizations were saved into one directory; remove the file of the one that was not meant",
        )
    return replace(text, quantization=QuantizationConfig("modelopt", quantization, source))


def _checkpoint(
    directory: Path, source: str, text: TextConfig, weights: WeightFiles, known_tokenizer: Path | None = None
) -> Checkpoint:
    tensors, stored = _opened(weights, text)
    canonical = canonical_tensors(tensors, text.architecture, source)
    if not canonical.tensors:
        raise BadInputError(f"{source} holds no weights of a text model", "pass the directory of a complete model")
    assets = collect_assets(directory, known_tokenizer)
    found = (
        f"Hugging Face directory, {text.architecture}, {_files(weights)}, "
        f"{len(canonical.tensors)} tensors, {dtype_summary(canonical.tensors)}"
    )
    notes = (found, *stored, *ignored_notes(canonical, text), *weights.notes, *assets.notes)
    return Checkpoint("huggingface", source, text.architecture, text.config, canonical.tensors, assets.files, notes)


def _opened(weights: WeightFiles, text: TextConfig) -> tuple[Mapping[str, LazyTensor], tuple[str, ...]]:
    """The tensors of the unquantized model, and notes of what they are stored as."""
    if text.quantization is None:
        return weights.tensors, ()
    from trtllm.frontends.quantized.methods import open_quantized

    opened = open_quantized(weights.tensors, text.quantization)
    return opened.tensors, opened.notes


def _files(weights: WeightFiles) -> str:
    count = len(weights.files)
    return f"{count} {weights.kind} file{'s' if count != 1 else ''}"


def dtype_summary(tensors: Mapping[str, LazyTensor]) -> str:
    """The element types, the most frequent first: "bfloat16" or "bfloat16 and float32"."""
    counts = Counter(tensor.spec.dtype.value for tensor in tensors.values())
    return " and ".join(name for name, _ in counts.most_common())


def ignored_notes(canonical: CanonicalTensors, text: TextConfig) -> tuple[str, ...]:
    """One note for each kind of tensor that was left out."""
    notes = []
    if text.wrapper:
        notes.append(f"{text.wrapper} is read as its text model, {text.architecture}")
    if canonical.vision:
        notes.append(f"ignored, not of the text model: {_listed(canonical.vision)}")
    if canonical.buffers:
        notes.append(f"ignored, buffers that are no weights: {_listed(canonical.buffers)}")
    return tuple(notes)


def _listed(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{rest}"
