"""Quantization schemes: frozen values with the reference QuantAlgo names, one dataclass for each kind of scheme.

A kind says what passes and calibration do with a network; a scheme is a value of it. What a build asks for beside the
scheme's name (layers kept out, layers of another scheme, a budget of bits) is a `LayerPlan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

WeightScales = Literal["absmax", "search"]
"""How a block's scale is chosen: so that its largest element fits, or so that the block's squared error is least."""
CalibratedMethod = Literal["awq", "gptq"]


@dataclass(frozen=True)
class WeightOnly:
    """Weights as block-wise integers; activations stay floating point. Needs the weights alone.

    A weight [N, K] gets one scale per row and `block_size` consecutive inputs. The vocabulary head takes
    `head_bits`, because its errors reach the logits directly.
    """

    name: str
    bits: int
    block_size: int = 32
    head_bits: int = 8
    weight_scales: WeightScales = "absmax"


@dataclass(frozen=True)
class CalibratedWeightOnly:
    """Weights as block-wise integers that are chosen by what calibration text puts through each layer.

    "awq" scales input channels before it rounds, "gptq" makes later columns answer for the rounding of earlier ones.
    """

    name: str
    bits: int
    method: CalibratedMethod
    block_size: int = 32
    head_bits: int = 8
    weight_scales: WeightScales = "search"


@dataclass(frozen=True)
class MixedPrecision:
    """Layers of several weight-only schemes; `choices` are their bits, from which a budget is spent."""

    name: str
    choices: tuple[int, ...] = (4, 8, 16)
    block_size: int = 32
    head_bits: int = 8
    weight_scales: WeightScales = "search"


Scheme = WeightOnly | CalibratedWeightOnly | MixedPrecision
"""Every kind of scheme. A new kind joins this union, and its values join the table below."""


def _table(*schemes: Scheme) -> dict[str, Scheme]:
    table = {scheme.name: scheme for scheme in schemes}
    assert len(table) == len(schemes), "two schemes have one name"
    return table


SCHEMES: Mapping[str, Scheme] = _table(
    WeightOnly("W8A16", bits=8),
    WeightOnly("W4A16", bits=4),
    CalibratedWeightOnly("W4A16_AWQ", bits=4, method="awq"),
    CalibratedWeightOnly("W4A16_GPTQ", bits=4, method="gptq"),
    CalibratedWeightOnly("W8A16_GPTQ", bits=8, method="gptq"),
    MixedPrecision("MIXED_PRECISION"),
)


def needs_calibration(scheme: Scheme) -> bool:
    """Whether a build must run the graph on text before it can quantize."""
    return isinstance(scheme, CalibratedWeightOnly)


@dataclass(frozen=True)
class LayerPlan:
    """Which layers a scheme leaves out, and which take another one. Patterns are globs over module names.

    A module's name is its weight's without `.weight`: `model.layers.3.mlp.down_proj`, `lm_head`.
    """

    exclude_modules: tuple[str, ...] = ()
    quantized_layers: Mapping[str, str] = field(default_factory=dict)
    """Pattern -> the name of a scheme; the first that matches counts."""

    def excludes(self, module: str) -> bool:
        """Whether the module keeps its full precision."""
        return any(_matches(module, pattern) for pattern in self.exclude_modules)

    def override(self, module: str) -> str | None:
        """The scheme's name that the module takes instead of the build's; None when it takes the build's."""
        return next((name for pattern, name in self.quantized_layers.items() if _matches(module, pattern)), None)


def _matches(module: str, pattern: str) -> bool:
    """A pattern matches a whole name, or a trailing part of it that begins after a dot."""
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")
