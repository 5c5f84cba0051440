"""GPTQ, formats 1 and 2: 2, 3, 4 or 8 bits packed along the inputs, zero points along the outputs.

qweight int32 [K*b/32, N], qzeros int32 [K/g, N*b/32], scales [K/g, N], g_idx int32 [K] (optional). An element is
(integer - zero point) * scale of its group; format 1 stores zero points less one, subtracted from whole words: a zero
point of 0 borrows from its neighbour. With desc_act, g_idx gives each input's group in an order that is not that of the
inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.checkpoints.stored import IntegerBlocks, Offset
from trtllm.dtypes import DType
from trtllm.errors import BadInputError
from trtllm.frontends.quantized.config import QuantizationConfig
from trtllm.frontends.quantized.parts import (
    SCALES,
    Parts,
    collect,
    columns_of,
    dense_tensor,
    integer_tensor,
    unpacked,
    words_of,
)

_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")


def open_gptq(tensors: Mapping[str, LazyTensor], config: QuantizationConfig) -> dict[str, LazyTensor]:
    bits = config.integer("bits")
    if bits not in _BITS:
        raise config.unsupported(f"{bits} bits")
    layout = str(config.values.get("checkpoint_format") or "gptq")
    if layout not in _FORMATS:
        raise config.unsupported(f"checkpoint_format '{layout}' (of its formats, {' and '.join(_FORMATS)})")
    layers, result = collect(tensors, ("qweight", "qzeros", "scales", "g_idx"), "qweight")
    for layer in layers:
        result[f"{layer.module}.weight"] = _weight(layer, config, bits, is_first_format=layout == "gptq")
    return result


def _weight(layer: Parts, config: QuantizationConfig, bits: int, *, is_first_format: bool) -> LazyTensor:
    words, outputs = layer.matrix("qweight", DType.INT32)
    if words * 32 % bits or outputs * bits % 32:
        raise BadInputError(
            f"tensor '{layer.get('qweight').spec}' holds no whole number of inputs of {bits} bits",
            "the quantization config and the weights are of different models",
        )
    inputs = words * 32 // bits
    group = config.group_size(inputs, layer.module)
    groups = inputs // group
    scales = layer.shaped("scales", groups, outputs, dtypes=SCALES)
    packed_zeros = layer.shaped("qzeros", groups, outputs * bits // 32, dtypes=(DType.INT32,))
    order = _group_order(layer, inputs, group)
    zeros = _zero_points(words_of(packed_zeros), bits, is_first_format=is_first_format)
    middle = 1 << (bits - 1)
    is_symmetric = bool((zeros == middle).all())
    held: Literal[4, 8] = 8 if bits == 8 else 4
    shift = middle if is_symmetric or bits == 8 else 0
    qweight = layer.get("qweight")

    def values(start: int, stop: int) -> np.ndarray:
        columns = np.ascontiguousarray(words_of(qweight)[:, start:stop].T)
        return (unpacked(columns, bits) - np.uint8(shift)).view(np.int8)

    def offsets(start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray((zeros[:, start:stop] - shift).T).astype(np.float32)

    blocks = IntegerBlocks(values, columns_of(scales), None if is_symmetric else offsets)
    name, shape, method = f"{layer.module}.weight", (outputs, inputs), f"GPTQ {bits} bits"
    if order is None:
        offset = Offset.NONE if is_symmetric else Offset.ZERO_POINT
        return integer_tensor(name, shape, method, held, group, scales.spec.dtype, blocks, offset)

    def dense(start: int, stop: int) -> np.ndarray:
        elements = values(start, stop).astype(np.float32)
        elements -= offsets(start, stop)[:, order]
        elements *= blocks.scales(start, stop)[:, order]
        return elements

    return dense_tensor(name, shape, f"{method} in activation order", dense, coarse=held == 4)


def _zero_points(words: np.ndarray, bits: int, *, is_first_format: bool) -> np.ndarray:
    """int16 [groups, N]. Three bits, which cross words, are raised one by one."""
    if is_first_format and bits != 3:
        words = words + np.uint32(0xFFFFFFFF // ((1 << bits) - 1))
    zeros = unpacked(words, bits).astype(np.int16)
    return (zeros + 1) & 7 if is_first_format and bits == 3 else zeros


def _group_order(layer: Parts, inputs: int, group: int) -> np.ndarray | None:
    """Each input's group; None when groups lie in order. Raises BadInputError for a group that does not exist."""
    if "g_idx" not in layer:
        return None
    order = layer.shaped("g_idx", inputs, dtypes=(DType.INT32, DType.INT64)).read()
    strange = order[(order < 0) | (order >= inputs // group)]
    if strange.size:
        raise BadInputError(
            f"tensor '{layer.module}.g_idx' names group {int(strange[0])} of {inputs // group}",
            "the checkpoint is damaged; fetch it again",
        )
    return None if np.array_equal(order, np.arange(inputs) // group) else order
