"""Rounds the linears of one segment by the method of the settings, from the second moments of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.quantize import CountedBlocks, QuantizedBlocks, dequantize_blocks
from trtllm.checkpoints.recipes import Cast, Recipe, Source
from trtllm.compiler.calibration.channel_scales import channel_scales, gated_linear_of, norm_of
from trtllm.compiler.calibration.moments import InputMoments
from trtllm.compiler.calibration.record import COUNTED, MINIMA, RESCALED, SCALES, VALUES
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
    counted: bool = False
    """Whether blocks of 4 bits have minima."""


class SegmentRounder:
    """The weights of one segment on their way to integers."""

    def __init__(
        self, settings: CalibrationSettings, payloads: Mapping[str, np.ndarray], moments: Mapping[str, InputMoments],
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
                self._round(value, linears, self._scaled(value, linears))
        else:
            for value, linears in groups.items():
                self._round(value, linears, None)
        return self._results, self._weights

    def _round(self, value: ir.Value, linears: list[ir.Node], scales: np.ndarray | None) -> None:
        """Rounds the linears of one input, whose channels are divided by `scales`, by GPTQ."""
        moments = self._moments[value.name or ""]
        own = moments.own if scales is None else moments.own / np.multiply.outer(scales, scales, dtype=np.float64)
        factor, counted = gptq_factor(own), self._settings.counted
        for linear in linears:
            weight = moments.aimed(self._weights[_weight_name(linear)], linear)
            if scales is not None:
                weight = weight * scales
            self._keep(
                linear, round_by_gptq(weight, factor, *self._storage(linear), counted=counted, threads=self._threads)
            )

    def _scaled(self, value: ir.Value, linears: list[ir.Node]) -> np.ndarray:
        """The scales of an input's channels, taken up by what makes it; ones where nothing can."""
        moments = self._moments[value.name or ""].own
        bits, block_size = self._storage(linears[0])
        norm, gated = norm_of(value, linears), gated_linear_of(value, linears)
        scales = np.ones(len(moments), np.float32)
        if norm is not None or (gated is not None and self._is_quantized(gated)):
            weights = [self._weights[_weight_name(linear)] for linear in linears]
            scales = channel_scales(weights, moments, bits, block_size, counted=self._settings.counted)
        if norm is not None:
            for vector in norm.inputs[1:]:
                name = (vector.name or "") if vector is not None else ""
                self._weights[name] = self._weights[name] / scales
                self._results[name + RESCALED] = self._weights[name]
        elif gated is not None and self._is_quantized(gated):
            name = _weight_name(gated)
            self._weights[name] = self._weights[name] / scales[:, None]
        return scales

    def _storage(self, linear: ir.Node) -> tuple[int, int]:
        """Bits and block size."""
        source = weight_source(linear)
        assert source is not None
        return self._settings.bits[source.name], self._settings.block_size

    def _is_quantized(self, linear: ir.Node) -> bool:
        source = weight_source(linear)
        return source is not None and source.name in self._settings.bits

    def _keep(self, linear: ir.Node, blocks: QuantizedBlocks | CountedBlocks) -> None:
        source = weight_source(linear)
        assert source is not None
        values = COUNTED if isinstance(blocks, CountedBlocks) else VALUES
        self._results |= {source.name + values: blocks.values, source.name + SCALES: blocks.scales}
        if isinstance(blocks, CountedBlocks):
            self._results[source.name + MINIMA] = blocks.minima
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
