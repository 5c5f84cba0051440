"""The architectures that can be built, by their Hugging Face class name; builders load on demand."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.nearest_family import nearest_family
from trtllm.errors import UnsupportedModelError

Builder = Callable[[ModelBuilder], Network]

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "trtllm.compiler.models.llama:build",
    "MistralForCausalLM": "trtllm.compiler.models.mistral:build",
    "MinistralForCausalLM": "trtllm.compiler.models.mistral:build",
    "Qwen2ForCausalLM": "trtllm.compiler.models.qwen2:build",
    "Qwen3ForCausalLM": "trtllm.compiler.models.qwen3:build",
    "MixtralForCausalLM": "trtllm.compiler.models.mixtral:build",
    "Qwen3MoeForCausalLM": "trtllm.compiler.models.qwen3_moe:build",
    "Gemma2ForCausalLM": "trtllm.compiler.models.gemma2:build",
    "Gemma3ForCausalLM": "trtllm.compiler.models.gemma3:build",
    "Phi3ForCausalLM": "trtllm.compiler.models.phi3:build",
    "GPT2LMHeadModel": "trtllm.compiler.models.gpt2:build",
    "BertModel": "trtllm.compiler.models.bert:build_bert",
    "RobertaModel": "trtllm.compiler.models.bert:build_roberta",
    "XLMRobertaModel": "trtllm.compiler.models.bert:build_roberta",
    "DistilBertModel": "trtllm.compiler.models.bert:build_distilbert",
}


def builder_for(checkpoint: Checkpoint) -> Builder:
    """The builder of a checkpoint's architecture.

    Raises UnsupportedModelError that names the nearest known architecture, and what is different in this one.
    """
    if checkpoint.architecture in ARCHITECTURES:
        return _load(ARCHITECTURES[checkpoint.architecture])
    family = nearest_family(checkpoint, {name: _load(home) for name, home in ARCHITECTURES.items()})
    near = f"; nearest is {family}" if family is not None else ""
    raise UnsupportedModelError(
        f"{checkpoint.source}: architecture '{checkpoint.architecture}' is not supported{near}",
        f"supported: {', '.join(ARCHITECTURES)}",
    )


def _load(home: str) -> Builder:
    module, function = home.split(":")
    builder: Builder = getattr(importlib.import_module(module), function)
    return builder
