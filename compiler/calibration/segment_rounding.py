"""Rounds the linears of one segment by the method of the settings, from the second moments of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.quantize import QuantizedBlocks, dequantize_blocks
from trtllm.checkpoints.recipes import Cast, Recipe, Source
from trtllm.compiler.calibration.channel_scales import channel_scales, gated_linear_of, norm_of, round_scaled
from trtllm.compiler.calibration.record import RESCALED, SCALES, VALUES
from trtllm.compiler.calibration.rounding import gptq_factor, round_by_gptq
from trtllm.compiler.ir.weights import weight_of
from trtllm.quantization import CalibratedMethod


@dataclass(frozen=True)
class CalibrationSettings:
    """What a calibration does, apart from model and text."""

    bits: Mapping[str, int]
    """Bits of each linear weight that is quantized, by the checkpoint's tensor name."""
    block_size: int = 32
    method: CalibratedMethod = "gptq"
    flows_quantized: bool = True
    """Whether a layer sees what the quantized layers before it make of the text, or what the full ones do."""


class SegmentRounder:
    """The weights of one segment on their way to integers."""

    def __init__(
        self, settings: CalibrationSettings, payloads: Mapping[str, np.ndarray], moments: Mapping[str, np.ndarray],
        threads: int,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._weights = dict(payloads)
        """By the graph's name; what calibration changes takes the place of what was published."""
        self._moments = moments
        self._threads = threads
        self._results: dict[str, np.ndarray] = {}

    def round(self, groups: Mapping[ir.Value, list[ir.Node]]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Tensors to store by name, and all payloads of the segment as the quantized graph has them."""
        if self._settings.method == "awq":
            # the last first: what a product's inputs are scaled by changes the weight that makes them
            for value, linears in reversed(list(groups.items())):
                self._round_scaled(value, linears)
        else:
            for value, linears in groups.items():
                factor = gptq_factor(self._moments[value.name or ""])
                for linear in linears:
                    weight = self._weights[_weight_name(linear)]
                    self._keep(linear, round_by_gptq(weight, factor, *self._storage(linear), threads=self._threads))
        return self._results, self._weights

    def _round_scaled(self, value: ir.Value, linears: list[ir.Node]) -> None:
        moments = self._moments[value.name or ""]
        bits, block_size = self._storage(linears[0])
        norm, gated = norm_of(value, linears), gated_linear_of(value, linears)
        scales = np.ones(len(moments), np.float32)
        if norm is not None or (gated is not None and self._is_quantized(gated)):
            weights = [self._weights[_weight_name(linear)] for linear in linears]
            scales = channel_scales(weights, moments, bits, block_size)
        if norm is not None:
            for vector in norm.inputs[1:]:
                name = (vector.name or "") if vector is not None else ""
                self._weights[name] = self._weights[name] / scales
                self._results[name + RESCALED] = self._weights[name]
        elif gated is not None and self._is_quantized(gated):
            name = _weight_name(gated)
            self._weights[name] = self._weights[name] / scales[:, None]
        for linear in linears:
            weight = self._weights[_weight_name(linear)]
            self._keep(linear, round_scaled(weight, scales, moments, *self._storage(linear), threads=self._threads))

    def _storage(self, linear: ir.Node) -> tuple[int, int]:
        """Bits and block size."""
        source = weight_source(linear)
        assert source is not None
        return self._settings.bits[source.name], self._settings.block_size

    def _is_quantized(self, linear: ir.Node) -> bool:
        source = weight_source(linear)
        return source is not None and source.name in self._settings.bits

    def _keep(self, linear: ir.Node, blocks: QuantizedBlocks) -> None:
        source = weight_source(linear)
        assert source is not None
        self._results |= {source.name + VALUES: blocks.values, source.name + SCALES: blocks.scales}
        self._weights[_weight_name(linear)] = dequantize_blocks(blocks, self._settings.bits[source.name])


def _weight_name(linear: ir.Node) -> str:
    weight = linear.inputs[1]
    assert weight is not None
    return weight.name or ""


def weight_source(linear: ir.Node) -> Source | None:
    """The checkpoint tensor that a linear's weight is; None when it is made of more."""
    weight = weight_of(linear.inputs[1])
    return source_of(weight.recipe) if weight is not None else None


def source_of(recipe: Recipe) -> Source | None:
    """The checkpoint tensor that a weight is, but for its type; None when it is made of more."""
    while isinstance(recipe, Cast):
        recipe = recipe.of
    return recipe if isinstance(recipe, Source) else None
