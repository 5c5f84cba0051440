"""What every target's emitter returns."""

from __future__ import annotations

from dataclasses import dataclass

from trtllm.compiler.engine import TargetEntry, WeightEntry


@dataclass(frozen=True)
class Emitted:
    """What an emitter leaves in the writer's folder."""

    target: TargetEntry
    weights: list[WeightEntry]
    stripped: tuple[str, ...] = ()
    """Weights that could not be written, because the checkpoint was pruned; see `trtllm.compiler.stripping`."""
