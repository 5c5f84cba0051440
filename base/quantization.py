"""Quantization schemes: frozen values with the reference QuantAlgo names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class WeightOnly:
    """Weights as block-wise symmetric integers rounded to nearest; activations stay floating point.

    A weight [N, K] gets one scale per row and `block_size` consecutive inputs. The vocabulary head takes
    `head_bits`, because its errors reach the logits directly.
    """

    name: str
    bits: int
    block_size: int = 32
    head_bits: int = 8


SCHEMES: Mapping[str, WeightOnly] = {
    scheme.name: scheme for scheme in (WeightOnly("W8A16", bits=8), WeightOnly("W4A16", bits=4))
}
