"""Weights that a checkpoint holds quantized: how they are stored, and their integers, scales and offsets by rows.

An element is `scale * (integer - zero point)`, `scale * integer + minimum`, or neither: a code of a table, an integer
whose scale changes within a block. Every such weight can also be read dequantized, in float32.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor, TensorSpec
from trtllm.dtypes import DType

BLOCK = 32
"""Inputs that share a scale in the integer form of `trtllm.checkpoints.recipes`; groups are repeated to it."""


class Offset(enum.Enum):
    """What belongs to a group of integers beside their scale."""

    NONE = "none"
    MINIMUM = "minimum"
    """Is added to every element of the group."""
    ZERO_POINT = "zero_point"
    """Is subtracted from every integer before it is multiplied."""


@dataclass(frozen=True)
class IntegerForm:
    """What the integers of a weight are."""

    bits: Literal[4, 8]
    """What the integers need. 4 bits: -8 .. 7, or 0 .. 15 with offsets. 8 bits: -128 .. 127."""
    group_size: int
    """Consecutive inputs that share scale and offset; a multiple of `BLOCK`."""
    offset: Offset = Offset.NONE
    scale_dtype: DType = DType.FLOAT16
    """What holds every scale (and minimum) exactly."""

    @property
    def is_exact(self) -> bool:
        """Whether float16 scales keep every bit. Of bfloat16 scales it keeps those from 2^-17 on."""
        return self.scale_dtype is DType.FLOAT16


@dataclass(frozen=True)
class StoredQuantization:
    """How a checkpoint holds one weight."""

    method: str
    """For messages: "GGUF Q4_K", "AWQ 4 bits"."""
    integers: IntegerForm | None
    """None when no integers with one scale for each 32 inputs express it."""
    coarse: bool = False
    """Without integers: whether the largest steps stored in a block of 32 are several times those of 8-bit integers, so
    that rounding to these costs little beside what the quantization did."""


@dataclass(frozen=True, eq=False)
class IntegerBlocks:
    """The integer form by rows: each takes a row range and gives an array with these rows."""

    values: Callable[[int, int], np.ndarray]
    """int8 [rows, K]."""
    scales: Callable[[int, int], np.ndarray]
    """float32 [rows, K / group_size]."""
    offsets: Callable[[int, int], np.ndarray] | None = None
    """float32 [rows, K / group_size]."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A lazy tensor [N, K] that reads as float32 and knows what it is stored as."""

    spec: TensorSpec
    stored: StoredQuantization
    blocks: IntegerBlocks | None
    dense: Callable[[int, int], np.ndarray] | None = None
    """The dequantized rows; without it they are made of `blocks`."""

    def __post_init__(self) -> None:
        assert (self.blocks is None) == (self.stored.integers is None), self.spec.name
        assert self.blocks is not None or self.dense is not None, self.spec.name

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        start, stop, _ = slice(start, stop).indices(self.spec.shape[0])
        if self.dense is not None:
            return self.dense(start, stop)
        assert self.blocks is not None and self.stored.integers is not None
        return dequantized(self.blocks, self.stored.integers, start, stop)

    def under(self, name: str) -> QuantizedTensor:
        """The same tensor under another name."""
        spec = TensorSpec(name, self.spec.shape, self.spec.dtype)
        return QuantizedTensor(spec, self.stored, self.blocks, self.dense)


def dequantized(blocks: IntegerBlocks, form: IntegerForm, start: int, stop: int) -> np.ndarray:
    """float32 [rows, K]. Products are exact up to 24 bits, so each element is rounded once at most."""
    values = blocks.values(start, stop)
    elements = values.reshape(stop - start, -1, form.group_size).astype(np.float32)
    scales = blocks.scales(start, stop)[:, :, None]
    if form.offset is Offset.NONE:
        elements *= scales
        return elements.reshape(values.shape)
    assert blocks.offsets is not None
    offsets = blocks.offsets(start, stop)[:, :, None]
    if form.offset is Offset.ZERO_POINT:
        elements -= offsets
        elements *= scales
    else:
        elements *= scales
        elements += offsets
    return elements.reshape(values.shape)


def stored_quantizations(tensors: Mapping[str, LazyTensor]) -> dict[str, StoredQuantization]:
    """What each quantized tensor of a checkpoint is stored as, by name."""
    return {name: tensor.stored for name, tensor in tensors.items() if isinstance(tensor, QuantizedTensor)}
