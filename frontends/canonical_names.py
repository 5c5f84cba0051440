"""Brings tensor names to those of the published causal (or BERT base) model, whoever saved the checkpoint.

Base classes save without their prefix (`h.0.` for `transformer.h.0.`), multi-modal wrappers put the text model under
one, transformers 5 holds the experts of a layer as one tensor, old files carry buffers that are no weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.errors import BadInputError
from trtllm.frontends.fused_experts import split_experts
from trtllm.frontends.tensor_views import renamed

_BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|embeddings\.position_ids)$"
    r"|(^|\.)h\.\d+\.attn\.(bias|masked_bias)$"
)
_VISION = re.compile(r"^(model\.)?(vision_tower|vision_model|multi_modal_projector|visual|embed_vision)\.")
_ENCODER_PREFIXES: Mapping[str, str] = {
    "Bert": "bert.",
    "Roberta": "roberta.",
    "XLMRoberta": "roberta.",
    "DistilBert": "distilbert.",
}
"""What task models put before the names of their base encoder, by the start of the class name."""
_OLD_NORMS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Names in checkpoints that were converted from TensorFlow."""
_TEXT_MODEL_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.", "model."),
)


@dataclass(frozen=True, eq=False)
class CanonicalTensors:
    """Tensors by canonical name, and the names of the source that are no weights of the text model."""

    tensors: Mapping[str, LazyTensor]
    buffers: tuple[str, ...]
    vision: tuple[str, ...]


def canonical_tensors(tensors: Mapping[str, LazyTensor], architecture: str, source: str) -> CanonicalTensors:
    """`tensors` renamed for `architecture`; raises BadInputError when two names become one."""
    buffers = tuple(name for name in tensors if _BUFFERS.search(name))
    vision = tuple(name for name in tensors if _VISION.match(name))
    kept = [name for name in tensors if name not in {*buffers, *vision}]
    rename = _renaming(architecture, kept)
    result: dict[str, LazyTensor] = {}
    for name in kept:
        canonical = rename(name)
        if canonical in result:
            raise BadInputError(
                f"{source} has tensor '{canonical}' twice, once as '{name}'",
                "two models were saved as one checkpoint",
            )
        result[canonical] = renamed(tensors[name], canonical)
    return CanonicalTensors(split_experts(result, architecture), buffers, vision)


def _renaming(architecture: str, names: Iterable[str]) -> Callable[[str], str]:
    names = list(names)
    for family, prefix in _ENCODER_PREFIXES.items():
        if architecture.startswith(family):
            return lambda name, prefix=prefix: _encoder_name(name, prefix)  # type: ignore[misc]
    if architecture.startswith("GPT2"):
        return _prefixed("transformer.", names)
    if any(name.startswith(("language_model.", "model.language_model.")) for name in names):
        return _text_model_name
    return _prefixed("model.", names)


def _prefixed(prefix: str, names: list[str]) -> Callable[[str], str]:
    """Adds `prefix` to the names of a model saved from its base class, where nothing carries it."""
    if any(name.startswith(prefix) for name in names):
        return lambda name: name
    return lambda name: name if name.startswith("lm_head.") else prefix + name


def _encoder_name(name: str, prefix: str) -> str:
    name = name.removeprefix(prefix)
    ending = ".".join(name.rsplit(".", 2)[-2:])
    return name.removesuffix(ending) + _OLD_NORMS.get(ending, ending)


def _text_model_name(name: str) -> str:
    for prefix, replacement in _TEXT_MODEL_PREFIXES:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return name
