"""The architectures that can be built, by their Hugging Face class name; builders load on demand."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.network import Network
from trtllm.errors import UnsupportedModelError, nearest

Builder = Callable[[ModelBuilder], Network]

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "trtllm.compiler.models.llama:build",
    "MistralForCausalLM": "trtllm.compiler.models.llama:build",
}


def builder_for(checkpoint: Checkpoint) -> Builder:
    """The builder of a checkpoint's architecture. Raises UnsupportedModelError naming the nearest known one."""
    home = ARCHITECTURES.get(checkpoint.architecture)
    if home is None:
        raise UnsupportedModelError(
            f"{checkpoint.source}: architecture {nearest(checkpoint.architecture, ARCHITECTURES)} is not supported",
            f"supported: {', '.join(ARCHITECTURES)}",
        )
    module, function = home.split(":")
    builder: Builder = getattr(importlib.import_module(module), function)
    return builder
