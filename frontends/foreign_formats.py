"""Recognises models and directories that are no model this version reads, so that the refusal can name them."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from trtllm.errors import TrtllmError, UnsupportedModelError, UsageError

_CONVERT = "convert it to Hugging Face (safetensors) first and pass that directory"


def refuse_foreign_directory(directory: Path) -> None:
    """Raises the error that names what `directory` is, if it is something known that is not read."""
    holds = _Contents(directory)
    if holds("manifest.json") and (holds("*.engine") or holds("config.json")):
        raise UsageError(f"{directory} is an engine directory, a model was expected", "run it, or pass the model")
    if holds("rank0.engine"):
        _refuse(directory, "TensorRT-LLM engine", "pass the Hugging Face model that it was converted from")
    if (holds("context/") and holds("weights/")) or holds("model_config.yaml"):
        _refuse(directory, "NeMo checkpoint", _CONVERT)
    if holds(".metadata") or holds("*.distcp") or holds("common.pt"):
        _refuse(directory, "Megatron or torch_dist checkpoint", _CONVERT)
    if holds("_METADATA") or holds("_CHECKPOINT_METADATA") or holds("manifest.ocdbt"):
        _refuse(directory, "JAX checkpoint (orbax)", _CONVERT)
    if holds("adapter_config.json") and not holds("config.json"):
        _refuse(directory, "LoRA adapter without its base model", "merge it into its base model and pass the result")
    if not _has_weights(holds):
        _refuse_other_weights(directory, holds)


def refuse_foreign_file(file: Path, head: bytes) -> None:
    """Raises the error that names what `file` is; `head` is its first 512 bytes."""
    if head[257:262] == b"ustar" or (file.suffix == ".nemo" and head[:2] == b"\x1f\x8b"):
        _refuse(file, "NeMo checkpoint (a tar archive)" if file.suffix == ".nemo" else "tar archive", _CONVERT)
    if file.suffix == ".msgpack":
        _refuse(file, "JAX checkpoint (flax msgpack)", _CONVERT)
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        _refuse(file, "HDF5 file of Keras or TensorFlow", _CONVERT)
    if file.suffix == ".onnx":
        _refuse(file, "ONNX model", "pass the model it was exported from")
    if file.suffix in (".engine", ".plan"):
        _refuse(file, "serialized engine", "pass the model it was built from")


class _Contents:
    """Answers what a directory holds: a name, a `folder/`, or a pattern."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __call__(self, name: str) -> bool:
        if "*" in name:
            return next(self._directory.glob(name), None) is not None
        path = self._directory / name
        return path.is_dir() if name.endswith("/") else path.is_file()


def _has_weights(holds: _Contents) -> bool:
    return holds("*.safetensors") or holds("*.bin") or holds("*.index.json") or holds("*.gguf")


def _refuse_other_weights(directory: Path, holds: _Contents) -> None:
    if holds("flax_model.msgpack") or holds("*.msgpack"):
        _refuse(directory, "JAX checkpoint (flax msgpack)", _CONVERT)
    if holds("*.nemo"):
        _refuse(directory, "directory of a NeMo checkpoint", _CONVERT)
    if holds("*.h5") or holds("saved_model.pb"):
        _refuse(directory, "TensorFlow or Keras model", _CONVERT)
    if holds("*.onnx"):
        _refuse(directory, "directory of an ONNX model", "pass the model it was exported from")


def _refuse(path: Path, kind: str, hint: str) -> NoReturn:
    article = "an" if kind[0] in "AEIOUH" and not kind.startswith("Hug") else "a"
    error: type[TrtllmError] = UnsupportedModelError
    raise error(f"{path} is {article} {kind}; this version does not read it", hint)
