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
    `head_bits`, because its errors reach the logits directly. With `has_zero_point` 4-bit blocks have a minimum beside
    their scale, where the target's products take it.
    """

    name: str
    bits: int
    block_size: int = 32
    head_bits: int = 8
    weight_scales: WeightScales = "absmax"
    has_zero_point: bool = False


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
    has_zero_point: bool = True


@dataclass(frozen=True)
class MixedPrecision:
    """Layers of several weight-only schemes; `choices` are their bits, from which a budget is spent."""

    name: str
    choices: tuple[int, ...] = (4, 8)
    block_size: int = 32
    head_bits: int = 8
    weight_scales: WeightScales = "search"
    has_zero_point: bool = True


ScaleOf = Literal["tensor", "channel", "block"]
"""What shares a scale of a weight: all of it, one output, or a block."""
RoundedPer = Literal["none", "tensor", "token", "block"]
"""What shares a scale of activations: nothing is rounded, all (a calibrated scale), one token, or its blocks."""


@dataclass(frozen=True)
class ScaledFormat:
    """Weights in a small format with floating scales, and activations rounded to the same format before each product.

    Blocks are 128 x 128 weights and 128 activations of e4m3; 16 of either for e2m1, whose scales are e4m3 themselves
    (32 weights and powers of two where activations stay as they are). `smoothing` is the share of the activations'
    range that moves into the weights, None for none. The vocabulary head stays out: it takes `head_bits` in blocks.
    """

    name: str
    element: Literal["e4m3", "int8", "e2m1"]
    weights: ScaleOf
    activations: RoundedPer
    smoothing: float | None = None
    block_size: int = 32
    head_bits: int = 8
    weight_scales: WeightScales = "absmax"

    @property
    def needs_ranges(self) -> bool:
        """Whether a build must measure activations first."""
        return self.activations == "tensor" or self.smoothing is not None or self.name == "NVFP4"


Scheme = WeightOnly | CalibratedWeightOnly | MixedPrecision | ScaledFormat
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
    ScaledFormat("FP8", "e4m3", "tensor", "tensor"),
    ScaledFormat("FP8_PER_CHANNEL_PER_TOKEN", "e4m3", "channel", "token"),
    ScaledFormat("FP8_BLOCK_SCALES", "e4m3", "block", "block"),
    ScaledFormat("W8A8", "int8", "channel", "token"),
    ScaledFormat("W8A8_SQ_PER_CHANNEL", "int8", "channel", "tensor", smoothing=0.5),
    ScaledFormat("W8A8_SQ_PER_TENSOR_PLUGIN", "int8", "tensor", "tensor", smoothing=0.5),
    ScaledFormat("W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "int8", "channel", "token", smoothing=0.5),
    ScaledFormat("W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", "int8", "channel", "tensor", smoothing=0.5),
    ScaledFormat("W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", "int8", "tensor", "token", smoothing=0.5),
    ScaledFormat("NVFP4", "e2m1", "block", "block"),
    ScaledFormat("W4A16_MXFP4", "e2m1", "block", "none"),
)


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
