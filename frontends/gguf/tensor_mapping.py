"""Maps the tensors of a GGUF file to those of the Hugging Face model: name, layout, one tensor an expert."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.errors import BadInputError, UnsupportedModelError
from trtllm.frontends.gguf import payloads
from trtllm.frontends.gguf.architectures import GgufArchitecture, Layout
from trtllm.frontends.gguf.container import GgufContainer, GgufTensor

_NAME = re.compile(
    r"^(?:blk\.(?P<layer>\d+)\.)?(?P<stem>[a-z_]+\d*[a-z_]*)(?:\.(?P<expert>\d+))?(?:\.(?P<kind>weight|bias))?$"
)


@dataclass(frozen=True, eq=False)
class MappedTensors:
    """Tensors by Hugging Face name, and what the user should know of the reading."""

    tensors: Mapping[str, LazyTensor]
    notes: tuple[str, ...]


def map_tensors(container: GgufContainer, architecture: GgufArchitecture, config: Mapping[str, Any]) -> MappedTensors:
    """Raises UnsupportedModelError for a tensor that `architecture` does not know or whose type is not read."""
    result: dict[str, LazyTensor] = {}
    ignored = []
    for tensor in container.tensors.values():
        match = _NAME.match(tensor.name)
        if match and match["stem"] in architecture.ignored:
            ignored.append(tensor.name)
            continue
        payloads.check_readable(tensor)
        for lazy in _converted(tensor, match, architecture, config):
            if lazy.spec.name in result:
                raise BadInputError(
                    f"{container.path} holds '{lazy.spec.name}' twice, the second time as '{tensor.name}'",
                    "the file is damaged; convert the model again",
                )
            result[lazy.spec.name] = lazy
    notes = _quantization_notes(container)
    if ignored:
        notes = (*notes, f"ignored, read as part of the config: {', '.join(ignored)}")
    return MappedTensors(result, notes)


def _converted(
    tensor: GgufTensor, match: re.Match[str] | None, architecture: GgufArchitecture, config: Mapping[str, Any]
) -> Iterator[LazyTensor]:
    name = _hf_name(match, architecture) if match else None
    if match is None or name is None:
        raise UnsupportedModelError(
            f"tensor '{tensor.name}' in {tensor.file.path} is of no known part of a {architecture.hf_class}",
            "the model has an extension that is not read; pass the Hugging Face model instead",
        )
    layout = architecture.layouts.get(match["stem"], Layout.AS_STORED)
    is_matrix = match["kind"] != "bias"
    if layout is Layout.EXPERTS:
        yield from _experts(tensor, name)
    elif layout is Layout.TRANSPOSED and is_matrix:
        yield payloads.transposed(_of_rank(tensor, 2), name)
    elif layout in (Layout.QUERY_ROTARY, Layout.KEY_ROTARY):
        yield payloads.rotary_halves(tensor, name, _head_size(tensor, layout, config))
    elif architecture.norms_plus_one and match["stem"].endswith("norm") and is_matrix:
        yield payloads.minus_one(tensor, name)
    else:
        yield payloads.as_stored(tensor, name)


def _hf_name(match: re.Match[str], architecture: GgufArchitecture) -> str | None:
    """The name, with `{expert}` left in it for a stack of experts."""
    names = architecture.top if match["layer"] is None else architecture.layer
    stem = names.get(match["stem"])
    is_stack = architecture.layouts.get(match["stem"]) is Layout.EXPERTS
    is_numbered = match["expert"] is not None
    if stem is None or is_numbered != ("{expert}" in stem and not is_stack):
        return None
    if is_numbered:
        stem = stem.format(expert=match["expert"])
    prefix = "" if match["layer"] is None else f"{architecture.layer_prefix}.{match['layer']}."
    return f"{prefix}{stem}.{match['kind'] or 'weight'}"


def _experts(tensor: GgufTensor, name: str) -> Iterator[LazyTensor]:
    stack = _of_rank(tensor, 3)
    for index in range(stack.shape[0]):
        yield payloads.expert(stack, name.format(expert=index), index)


def _head_size(tensor: GgufTensor, layout: Layout, config: Mapping[str, Any]) -> int:
    heads = config["num_attention_heads" if layout is Layout.QUERY_ROTARY else "num_key_value_heads"]
    if tensor.shape[0] % (2 * heads):
        raise BadInputError(
            f"tensor '{tensor.name}' in {tensor.file.path} has {tensor.shape[0]} rows, for {heads} heads",
            "the file is damaged; convert the model again",
        )
    return int(tensor.shape[0] // heads)


def _of_rank(tensor: GgufTensor, rank: int) -> GgufTensor:
    if len(tensor.shape) != rank:
        raise BadInputError(
            f"tensor '{tensor.name}' in {tensor.file.path} has {len(tensor.shape)} axes, expected {rank}",
            "the file is damaged; convert the model again",
        )
    return tensor


def _quantization_notes(container: GgufContainer) -> tuple[str, ...]:
    """("210 tensors Q4_1, 1 Q8_0",)"""
    kinds = Counter(tensor.kind.name for tensor in container.tensors.values() if payloads.is_quantized(tensor))
    if not kinds:
        return ()
    (first, count), *others = kinds.most_common()
    parts = [f"{count} tensor{'s' if count != 1 else ''} {first}", *(f"{number} {kind}" for kind, number in others)]
    return (f"quantized: {', '.join(parts)}",)
