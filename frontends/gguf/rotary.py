"""Finds the rotary scaling of a GGUF model: in its metadata, or in the frequency factors stored as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from trtllm.errors import UnsupportedModelError
from trtllm.frontends.gguf.container import GgufContainer
from trtllm.frontends.gguf.metadata import Metadata
from trtllm.frontends.gguf.payloads import as_stored

_LOW_FREQUENCY_FACTOR, _HIGH_FREQUENCY_FACTOR = 1.0, 4.0
"""Of every Llama 3.1 to 3.3 model."""
_TOLERANCE = 1e-4


def rotary_scaling(metadata: Metadata, container: GgufContainer) -> dict[str, Any] | None:
    """`rope_scaling` as in config.json, or None for plain rotary positions.

    Raises UnsupportedModelError for frequency factors that are of no known rule.
    """
    if "rope_freqs.weight" in container.tensors:
        return _llama3(metadata, _factors(container, "rope_freqs.weight"))
    if "rope_factors_long.weight" in container.tensors:
        return _longrope(container)
    kind = metadata.text("rope.scaling.type")
    factor = metadata.optional_number("rope.scaling.factor")
    if kind in (None, "none") or not factor:
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = metadata.optional_integer("rope.scaling.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _longrope(container: GgufContainer) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": _factors(container, "rope_factors_short.weight").tolist(),
        "long_factor": _factors(container, "rope_factors_long.weight").tolist(),
    }


def _factors(container: GgufContainer, name: str) -> np.ndarray:
    tensor = container.tensors.get(name)
    if tensor is None:
        raise UnsupportedModelError(f"{container.path} lacks '{name}'", "convert the model again")
    values = as_stored(tensor, name).read().astype(np.float32).reshape(-1)
    return np.array([float(str(value)) for value in values])


def _llama3(metadata: Metadata, factors: np.ndarray) -> dict[str, Any] | None:
    """The parameters whose rule gives `factors`, found by trying those that were published."""
    if np.allclose(factors, 1.0):
        return None
    theta = metadata.optional_number("rope.freq_base") or 10000.0
    factor = round(float(factors.max()), 4)
    for original in _original_lengths(metadata):
        if np.allclose(factors, _llama3_factors(len(factors), theta, factor, original), rtol=_TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW_FREQUENCY_FACTOR,
                "high_freq_factor": _HIGH_FREQUENCY_FACTOR,
                "original_max_position_embeddings": original,
            }
    raise UnsupportedModelError(
        f"{metadata.path} scales rotary positions by factors (rope_freqs.weight) of no known rule",
        "pass the Hugging Face model instead",
    )


def _original_lengths(metadata: Metadata) -> Iterator[int]:
    stated = metadata.optional_integer("rope.scaling.original_context_length")
    if stated:
        yield stated
    yield from (8192, 4096, 2048, 16384, 32768)


def _llama3_factors(count: int, theta: float, factor: float, original: int) -> np.ndarray:
    """The rule of convert_hf_to_gguf, which is that of transformers' `_compute_llama3_parameters` inverted."""
    wavelengths = 2 * math.pi * theta ** (np.arange(count) / count)
    low, high = original / _LOW_FREQUENCY_FACTOR, original / _HIGH_FREQUENCY_FACTOR
    smooth = (original / wavelengths - _LOW_FREQUENCY_FACTOR) / (_HIGH_FREQUENCY_FACTOR - _LOW_FREQUENCY_FACTOR)
    with np.errstate(divide="ignore"):
        between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < high, 1.0, np.where(wavelengths > low, factor, between))
