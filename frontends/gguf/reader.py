"""Reads a GGUF file as a checkpoint of the Hugging Face model that it was converted from."""

from __future__ import annotations

from pathlib import Path

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.errors import BadInputError, UnsupportedModelError
from trtllm.frontends.gguf.architectures import GgufArchitecture, find_architecture, supported_architectures
from trtllm.frontends.gguf.assets import build_assets
from trtllm.frontends.gguf.config import build_config
from trtllm.frontends.gguf.container import GgufContainer
from trtllm.frontends.gguf.splits import open_all_splits
from trtllm.frontends.gguf.tensor_mapping import map_tensors


def read_gguf(path: Path) -> Checkpoint:
    """The model in `path` (of a split model, any of its files).

    Quantized matrices read as float32 and keep what they are stored as; F32, F16 and BF16 stay what they are.
    Raises BadInputError for a damaged file, UnsupportedModelError for an architecture that is not read.
    """
    container = open_all_splits(path)
    architecture = _architecture(container)
    config = build_config(container, architecture)
    mapped = map_tensors(container, architecture, config)
    assets = build_assets(container, config)
    found = f"GGUF file, {architecture.hf_class}, {len(mapped.tensors)} tensors"
    notes = (found, *mapped.notes, *assets.notes)
    return Checkpoint("gguf", str(path), architecture.hf_class, config, mapped.tensors, assets.files, notes)


def _architecture(container: GgufContainer) -> GgufArchitecture:
    name = container.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise BadInputError(f"{container.path} names no architecture (general.architecture)", "convert the model again")
    architecture = find_architecture(name, has_experts=bool(container.metadata.get(f"{name}.expert_count")))
    if architecture is None:
        raise UnsupportedModelError(
            f"{container.path} is a GGUF file of architecture '{name}', which is not read",
            f"architectures that are read: {', '.join(supported_architectures())}",
        )
    return architecture
