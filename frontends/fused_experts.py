"""Presents the experts of a mixture, held as one tensor a layer, under the names of the published checkpoints.

transformers 5 holds `mlp.experts.gate_up_proj` [experts, 2 * intermediate, hidden] (gate rows first) and
`mlp.experts.down_proj` [experts, hidden, intermediate]; published checkpoints hold one matrix an expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.errors import BadInputError
from trtllm.frontends.tensor_views import renamed, stack_rows

_FUSED = re.compile(r"^(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?$")
_ROUTER = re.compile(r"^(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight$")


@dataclass(frozen=True)
class ExpertNames:
    """How a family names the mixture's block and the three matrices of an expert."""

    block: str
    gate: str
    up: str
    down: str

    def matrix(self, layer: str, expert: int, matrix: str) -> str:
        return f"{layer}.{self.block}.experts.{expert}.{getattr(self, matrix)}.weight"

    def router(self, layer: str) -> str:
        return f"{layer}.{self.block}.gate.weight"


_QWEN = ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")
EXPERT_NAMES: Mapping[str, ExpertNames] = {
    "MixtralForCausalLM": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen2MoeForCausalLM": _QWEN,
    "Qwen3MoeForCausalLM": _QWEN,
}


def split_experts(tensors: Mapping[str, LazyTensor], architecture: str) -> dict[str, LazyTensor]:
    """`tensors` with every fused expert tensor replaced by one tensor an expert; others stay as they are."""
    names = EXPERT_NAMES.get(architecture)
    if names is None:
        return dict(tensors)
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        fused, router = _FUSED.match(name), _ROUTER.match(name)
        if fused:
            result.update((part.spec.name, part) for part in _parts(tensor, names, fused[1], fused[2]))
        elif router:
            canonical = names.router(router[1])
            result[canonical] = renamed(tensor, canonical)
        else:
            result[name] = tensor
    return result


def _parts(tensor: LazyTensor, names: ExpertNames, layer: str, kind: str) -> Iterator[LazyTensor]:
    matrices = ("gate", "up") if kind == "gate_up_proj" else ("down",)
    shape = tensor.spec.shape
    if len(shape) != 3 or shape[1] % len(matrices):
        raise BadInputError(f"tensor '{tensor.spec}' is no stack of experts", "the checkpoint is of another layout")
    rows = shape[1] // len(matrices)
    for expert in range(shape[0]):
        for index, matrix in enumerate(matrices):
            yield stack_rows(tensor, names.matrix(layer, expert, matrix), expert, index * rows, rows)
