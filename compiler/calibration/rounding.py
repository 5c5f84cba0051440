"""GPTQ for one linear layer: from the second moments of its inputs to integers and scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trtllm.checkpoints.quantize import CountedBlocks, QuantizedBlocks, gptq
from trtllm.errors import BadInputError

DAMPING = 0.05
"""Of the mean second moment, added to each: keeps the inverse tame where inputs are nearly dependent."""


@dataclass(frozen=True, eq=False)
class GptqFactor:
    """What GPTQ needs of a layer's inputs, shared by all linears that read them."""

    factor: np.ndarray
    """float32 [K, K], upper triangular, in `order`."""
    order: np.ndarray
    """int32 [K]: the columns from the largest second moment to the smallest."""
    importance: np.ndarray
    """float32 [K]: second moments, of mean 1."""


def gptq_factor(moments: np.ndarray) -> GptqFactor:
    """From the inputs' second moments X'X, float64 [K, K]. Inputs that are always zero count as average ones."""
    diagonal = np.diag(moments).copy()
    mean = float(diagonal.mean())
    if not np.isfinite(mean):
        raise BadInputError("the activations are not finite", "the checkpoint is damaged, or overflows in float32")
    if mean <= 0:
        diagonal[:], mean = 1.0, 1.0
    dead = diagonal <= 0
    damped = moments + np.diag(np.where(dead, mean, DAMPING * mean))
    order = np.argsort(-diagonal, kind="stable").astype(np.int32)
    turned = damped[order][:, order]
    inverse = np.linalg.inv(turned)
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    importance = (np.maximum(diagonal, DAMPING * mean) / mean).astype(np.float32)
    return GptqFactor(np.ascontiguousarray(factor, np.float32), order, importance)


def round_by_gptq(
    weight: np.ndarray, factor: GptqFactor, bits: int, block_size: int, *, counted: bool = False, threads: int = 0
) -> QuantizedBlocks | CountedBlocks:
    """The quantized weight [N, K] whose outputs on the inputs behind `factor` are near those of the weight.

    With `counted` blocks of 4 bits have minima.
    """
    return gptq(
        np.asarray(weight, np.float32), factor.factor, factor.importance, bits, block_size, order=factor.order,
        counted=counted and bits == 4, threads=threads,
    )  # fmt: skip
