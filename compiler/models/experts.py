"""A mixture of experts as a decoder's feed-forward block; its weights are stacks of the experts' own matrices."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from trtllm.checkpoints.recipes import Concat, Recipe, Stack
from trtllm.compiler.models.context import ModelBuilder
from trtllm.errors import UnsupportedModelError


@dataclass(frozen=True)
class Mixture:
    """Sizes, routing and tensor names of a family's mixture."""

    hidden: int
    experts: int
    width: int
    """Of one expert."""
    top_k: int
    normalize: bool
    """Whether the weights of the chosen experts are rescaled to sum 1."""
    activation: str
    gate: str
    up: str
    down: str
    """Names of an expert's three matrices."""

    def check(self, source: str) -> None:
        """Raises UnsupportedModelError when a token is to go to more experts than there are."""
        if self.top_k > self.experts:
            raise UnsupportedModelError(
                f"{source}: config.json routes each token to {self.top_k} of {self.experts} experts",
                "take the config of the published model",
            )


def mixture_of_experts(m: ModelBuilder, x: ir.Value, name: str, mixture: Mixture) -> ir.Value:
    """x [B, S, H] through the experts of block `name`, chosen by the router `name`.gate."""
    mixture.check(m.checkpoint.source)
    logits = m.linear(x, f"{name}.gate", mixture.experts, mixture.hidden)
    gate_up = m.weight(f"{name}.experts.gate_up.weight", _stack(m, name, mixture, mixture.gate, mixture.up))
    down = m.weight(f"{name}.experts.down.weight", _stack(m, name, mixture, mixture.down))
    return m.b.dialect(
        "MoE",
        [x, logits, gate_up, down],
        name=f"{name}.experts",
        top_k=mixture.top_k,
        normalize=int(mixture.normalize),
        kind=mixture.activation,
    )


def _stack(m: ModelBuilder, name: str, mixture: Mixture, *matrices: str) -> Recipe:
    """[E, rows, inputs]: each expert's matrices one below the other."""
    shape = (mixture.hidden, mixture.width) if matrices == (mixture.down,) else (mixture.width, mixture.hidden)

    def matrix(expert: int, which: str) -> Recipe:
        return m.source(f"{name}.experts.{expert}.{which}.weight", *shape)

    experts = [tuple(matrix(expert, which) for which in matrices) for expert in range(mixture.experts)]
    return Stack(tuple(parts[0] if len(parts) == 1 else Concat(parts, axis=0) for parts in experts))
