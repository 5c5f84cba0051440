"""Which layers deserve more bits: what each one's rounding does to the states behind it, and how a budget is spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trtllm.checkpoints.quantize import dequantize_blocks, quantize_blocks, quantize_counted

SCALE_BITS = 16


@dataclass(frozen=True)
class Sensitivity:
    """One linear layer."""

    elements: int
    damage: Mapping[int, float]
    """By bits: squared change of the states behind its segment when it alone is rounded, relative to the states."""


def bits_with_scales(bits: int, block_size: int, *, counted: bool = False) -> float:
    """Bits per weight of integers and the scales of their blocks; 16 and more are stored without scales.

    With `counted` blocks of 4 bits have minima too.
    """
    beside = SCALE_BITS * (2 if counted and bits == 4 else 1)
    return bits + beside / block_size if bits < 16 else bits


def spend(
    layers: Mapping[str, Sensitivity], budget: float, block_size: int, *, counted: bool = False
) -> dict[str, int]:
    """Bits for each layer, at most `budget` bits per weight on average where the fewest bits allow it.

    Every layer begins with the fewest; then the one that gains most by each bit more is raised, as long as the budget
    lasts. Layers that gain as much are raised in the order given.
    """
    chosen = {name: min(layer.damage) for name, layer in layers.items()}
    total = sum(layer.elements for layer in layers.values())
    sizes = {
        bits: bits_with_scales(bits, block_size, counted=counted) for item in layers.values() for bits in item.damage
    }
    left = budget * total - sum(layers[name].elements * sizes[chosen[name]] for name in layers)
    steps = [step for name in layers for step in _steps(name, layers[name], sizes)]
    for step in sorted(steps, key=lambda step: -step.gain_per_bit):
        if chosen[step.name] == step.below and step.cost <= left:
            chosen[step.name] = step.above
            left -= step.cost
    return chosen


@dataclass(frozen=True)
class _Step:
    name: str
    below: int
    above: int
    cost: float
    """Bits in all."""
    gain_per_bit: float


def _steps(name: str, layer: Sensitivity, sizes: Mapping[int, float]) -> list[_Step]:
    widths = sorted(layer.damage)
    steps = []
    for below, above in pairwise(widths):
        cost = layer.elements * (sizes[above] - sizes[below])
        steps.append(_Step(name, below, above, cost, (layer.damage[below] - layer.damage[above]) / cost))
    return steps


def rounded(weight: np.ndarray, bits: int, block_size: int, *, counted: bool = False, threads: int = 0) -> np.ndarray:
    """What a plain quantization with searched scales (`counted`: and minima at 4 bits) makes of a weight [N, K]."""
    if counted and bits == 4:
        counts = quantize_counted(np.asarray(weight, np.float32), block_size, search=True, threads=threads)
        return dequantize_blocks(counts, bits)
    blocks = quantize_blocks(np.asarray(weight, np.float32), bits, block_size, "float16", search=True, threads=threads)
    return dequantize_blocks(blocks, bits)
