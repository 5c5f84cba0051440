"""Takes GGUF blocks apart: integers, scales and minima of the types that have one scale for every 32 elements.

Layouts are those of ggml/src/ggml-common.h, orders of elements those of ggml-quants.c.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from trtllm.checkpoints.stored import BLOCK, IntegerForm, Offset, StoredQuantization
from trtllm.dtypes import DType

Part = Callable[[np.ndarray], np.ndarray]
"""Takes blocks, uint8 [blocks, bytes of a block]."""

_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)


@dataclass(frozen=True, eq=False)
class BlockType:
    """How a type's blocks are taken apart; scales and minima are float32, one for every 32 elements."""

    form: IntegerForm
    values: Part
    """int8 [blocks, elements of a block]."""
    scales: Part
    minima: Part | None = None


def stored_quantization(kind: GGMLQuantizationType) -> StoredQuantization:
    """What a tensor of a quantized type is stored as; 8 bits in blocks of 32 are finer than any type without form."""
    block_type = BLOCK_TYPES.get(kind)
    return StoredQuantization(f"GGUF {kind.name}", block_type.form if block_type else None, coarse=block_type is None)


def part_rows(part: Part, rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """What `part` makes of uint8 rows [rows, bytes of a row]."""
    return part(rows.reshape(-1, GGML_QUANT_SIZES[kind][1])).reshape(len(rows), -1)


def _halves(offset: int) -> Part:
    """The float16 at byte `offset` of each block."""
    return lambda blocks: blocks[:, offset : offset + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(blocks: np.ndarray, first: int) -> np.ndarray:
    """16 bytes from `first` on as 32 elements: the low nibbles, then the high ones."""
    codes = blocks[:, first : first + 16]
    return np.concatenate([codes & 15, codes >> 4], axis=1).view(np.int8)


def _fifth_bits(blocks: np.ndarray, first: int) -> np.ndarray:
    """32 bits from byte `first` on, as 0 or 16."""
    return np.unpackbits(blocks[:, first : first + 4], axis=1, bitorder="little").view(np.int8) << 4


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and minima in 12 bytes of Q4_K and Q5_K (get_scale_min_k4)."""
    packed = blocks[:, 4:16]
    low, middle, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _super_scales(blocks: np.ndarray) -> np.ndarray:
    return _halves(0)(blocks) * _k_scales(blocks)[0]


def _super_minima(blocks: np.ndarray) -> np.ndarray:
    return -_halves(2)(blocks) * _k_scales(blocks)[1]


def _k_nibbles(blocks: np.ndarray, first: int) -> np.ndarray:
    """128 bytes as 256 elements: of each 32 bytes the low nibbles, then the high ones."""
    codes = blocks[:, first : first + 128].reshape(-1, 4, 1, 32)
    return np.concatenate([codes & 15, codes >> 4], axis=2).reshape(-1, 256).view(np.int8)


def _q5_k_values(blocks: np.ndarray) -> np.ndarray:
    high = blocks[:, 16:48].reshape(-1, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    return _k_nibbles(blocks, 48) | ((high & 1) << 4).reshape(-1, 256).view(np.int8)


_EIGHT = IntegerForm(8, BLOCK)
_Q = GGMLQuantizationType
BLOCK_TYPES: Mapping[GGMLQuantizationType, BlockType] = {
    _Q.Q4_0: BlockType(IntegerForm(4, BLOCK), lambda b: _nibbles(b, 2) - np.int8(8), _halves(0)),
    _Q.Q4_1: BlockType(IntegerForm(4, BLOCK, Offset.MINIMUM), lambda b: _nibbles(b, 4), _halves(0), _halves(2)),
    _Q.Q5_0: BlockType(_EIGHT, lambda b: (_nibbles(b, 6) | _fifth_bits(b, 2)) - np.int8(16), _halves(0)),
    _Q.Q5_1: BlockType(
        IntegerForm(8, BLOCK, Offset.MINIMUM),
        lambda b: _nibbles(b, 8) | _fifth_bits(b, 4),
        _halves(0),
        _halves(2),
    ),
    _Q.Q8_0: BlockType(_EIGHT, lambda b: b[:, 2:34].view(np.int8), _halves(0)),
    _Q.IQ4_NL: BlockType(_EIGHT, lambda b: _IQ4_NL[_nibbles(b, 2)], _halves(0)),
    _Q.Q4_K: BlockType(
        IntegerForm(4, BLOCK, Offset.MINIMUM, DType.FLOAT32),
        lambda b: _k_nibbles(b, 16),
        _super_scales,
        _super_minima,
    ),
    _Q.Q5_K: BlockType(
        IntegerForm(8, BLOCK, Offset.MINIMUM, DType.FLOAT32), _q5_k_values, _super_scales, _super_minima
    ),
}
"""The types that integers with scales of 32 elements express."""
