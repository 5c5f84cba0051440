"""AWQ (AutoAWQ `gemm`): 4 bits packed along the outputs, eight to a word in an order of their own.

qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales [K/g, N]; an element is (integer - zero point) * scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.checkpoints.stored import IntegerBlocks, Offset
from trtllm.dtypes import DType
from trtllm.frontends.quantized.config import QuantizationConfig
from trtllm.frontends.quantized.parts import SCALES, Parts, collect, columns_of, integer_tensor, words_of

_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""Of a word's eight columns, the one that each nibble holds, from the low one on."""


def open_awq(tensors: Mapping[str, LazyTensor], config: QuantizationConfig) -> dict[str, LazyTensor]:
    version = str(config.values.get("version", "gemm")).lower()
    if version != "gemm":
        raise config.unsupported(f"version '{version}' (of its packings, gemm alone)")
    if config.integer("bits", 4) != 4:
        raise config.unsupported(f"{config.integer('bits')} bits")
    layers, result = collect(tensors, ("qweight", "qzeros", "scales"), "qweight")
    for layer in layers:
        result[f"{layer.module}.weight"] = _weight(layer, config)
    return result


def _weight(layer: Parts, config: QuantizationConfig) -> LazyTensor:
    inputs, words = layer.matrix("qweight", DType.INT32)
    outputs = 8 * words
    group = config.group_size(inputs, layer.module)
    groups = inputs // group
    scales = layer.shaped("scales", groups, outputs, dtypes=SCALES)
    zeros = layer.shaped("qzeros", groups, words, dtypes=(DType.INT32,))
    integers, zero_points = _columns(layer.get("qweight")), _columns(zeros)
    blocks = IntegerBlocks(
        integers, columns_of(scales), lambda start, stop: zero_points(start, stop).astype(np.float32)
    )
    return integer_tensor(
        f"{layer.module}.weight",
        (outputs, inputs),
        "AWQ 4 bits",
        4,
        group,
        scales.spec.dtype,
        blocks,
        Offset.ZERO_POINT,
    )


def _columns(tensor: LazyTensor) -> Callable[[int, int], np.ndarray]:
    """Columns of the unpacked matrix as rows: int8 [columns, rows of `tensor`]."""

    def read(start: int, stop: int) -> np.ndarray:
        first = start // 8
        words = words_of(tensor)[:, first : -(-stop // 8)]
        columns = np.empty((words.shape[1], 8, len(words)), np.int8)
        for nibble, column in enumerate(_COLUMNS):
            columns[:, column] = ((words >> np.uint32(4 * nibble)) & np.uint32(15)).T
        return columns.reshape(-1, len(words))[start - 8 * first : stop - 8 * first]

    return read
