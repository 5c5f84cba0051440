"""AWQ: scales input channels of linears before they are rounded, and undoes it in what makes those inputs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.quantize import (
    CountedBlocks,
    QuantizedBlocks,
    dequantize_blocks,
    quantize_blocks,
    quantize_counted,
)
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.weights import weight_of

GRID = 20
"""Exponents that are tried, from 0 (no scaling) up."""
SEARCHED_ROWS = 512
"""Rows of a weight on which exponents are compared."""


def channel_scales(
    weights: Sequence[np.ndarray], moments: np.ndarray, bits: int, block_size: int, *, counted: bool = False
) -> np.ndarray:
    """float32 [K]: the scales under which rounding disturbs the outputs of weights [N, K] least.

    They are a power of the inputs' root mean square, which `moments` X'X [K, K] holds; the exponent is the one of the
    grid with the least error of the outputs, so never worse than no scaling on the rows compared.
    """
    strength = np.sqrt(np.maximum(np.diag(moments), 0))
    mean = float(strength.mean())
    if mean <= 0:
        return np.ones(len(moments), np.float32)
    strength = np.maximum(strength / mean, 1e-3)
    sampled = np.concatenate([weight[:: -(-len(weight) // SEARCHED_ROWS)] for weight in weights]).astype(np.float32)
    best, least = np.ones(len(moments), np.float32), np.inf
    for step in range(GRID):
        scales = strength ** (step / GRID)
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        blocks = round_scaled(sampled, scales, moments, bits, block_size, counted=counted)
        rounded = dequantize_blocks(blocks, bits) / scales
        error = output_error(rounded - sampled, moments)
        if error < least:
            best, least = scales, error
    return best


def round_scaled(
    weight: np.ndarray,
    scales: np.ndarray,
    moments: np.ndarray,
    bits: int,
    block_size: int,
    *,
    counted: bool = False,
    threads: int = 0,
) -> QuantizedBlocks | CountedBlocks:
    """The weight [N, K] times its channels' scales, rounded; moments weigh errors in the search for block scales."""
    diagonal = np.diag(moments) / np.square(scales, dtype=np.float64)
    mean = float(diagonal.mean())
    importance = np.maximum(diagonal / mean, 1e-4).astype(np.float32) if mean > 0 else np.ones_like(scales)
    scaled = np.ascontiguousarray(weight * scales, np.float32)
    if counted and bits == 4:
        return quantize_counted(scaled, block_size, search=True, importance=importance, threads=threads)
    return quantize_blocks(scaled, bits, block_size, "float16", search=True, importance=importance, threads=threads)


def output_error(difference: np.ndarray, moments: np.ndarray) -> float:
    """Squared error of the outputs on the inputs behind the moments, when a weight is off by `difference` [N, K]."""
    return float(np.einsum("nk,nk->", difference @ moments, difference))


def norm_of(value: ir.Value, linears: Sequence[ir.Node]) -> ir.Node | None:
    """The norm that makes the inputs of these linears and of nothing else, whose weight can take up their scales."""
    producer = value.producer()
    if producer is None or not is_dialect(producer, "RMSNorm", "LayerNorm"):
        return None
    has_weights = all(weight_of(item) is not None for item in producer.inputs[1:])
    return producer if has_weights and {use.node for use in value.uses()} == set(linears) else None


def gated_linear_of(value: ir.Value, linears: Sequence[ir.Node]) -> ir.Node | None:
    """The linear whose outputs, gated by another's, are the inputs of these linears and of nothing else."""
    producer = value.producer()
    if producer is None or not is_dialect(producer, "GatedActivation") or len(producer.inputs) != 2:
        return None
    raised = producer.inputs[1]
    source = raised.producer() if raised is not None else None
    if raised is None or source is None or not is_dialect(source, "Linear") or len(source.inputs) > 2:
        return None
    alone = len(list(raised.uses())) == 1 and {use.node for use in value.uses()} == set(linears)
    return source if alone else None
