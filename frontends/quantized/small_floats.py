"""Elements of 8 and 4 bits that are floating point numbers: E4M3 by table, E2M1 pairs unpacked."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1_CODES = np.concatenate([_E2M1, -_E2M1])
"""By code: bit 3 is the sign."""


def e4m3_as_float(stored: np.ndarray) -> np.ndarray:
    """float8_e4m3fn as float32, exactly."""
    return _E4M3[stored.view(np.uint8)]


def e2m1_pairs(packed: np.ndarray) -> np.ndarray:
    """uint8 [n, K/2] as float32 [n, K], the even element in the low nibble."""
    return _E2M1_CODES[np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)]


def nvfp4_rows(
    packed: LazyTensor, scales: LazyTensor, whole: Callable[[np.ndarray], np.ndarray]
) -> Callable[[int, int], np.ndarray]:
    """Rows of a matrix in blocks of 16 with E4M3 scales, to which `whole` applies the scale of the matrix."""

    def rows(start: int, stop: int) -> np.ndarray:
        elements = e2m1_pairs(packed.read(start, stop))
        block = whole(e4m3_as_float(scales.read(start, stop)))
        return (elements.reshape(stop - start, -1, 16) * block[:, :, None]).reshape(elements.shape)

    return rows
