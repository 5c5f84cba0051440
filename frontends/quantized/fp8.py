"""FP8 in blocks ("fp8" of transformers, DeepSeek): weight E4M3 [N, K] times weight_scale_inv of its block.

weight_scale_inv float32 [ceil(N/bn), ceil(K/bk)] multiplies, despite its name. Without weight_block_size it is one
number, or one for each output.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.dtypes import DType
from trtllm.frontends.quantized.config import QuantizationConfig
from trtllm.frontends.quantized.parts import SCALES, Parts, collect, dense_tensor
from trtllm.frontends.quantized.small_floats import e4m3_as_float


def open_fp8(tensors: Mapping[str, LazyTensor], config: QuantizationConfig) -> dict[str, LazyTensor]:
    eight_bits = {name for name, tensor in tensors.items() if tensor.spec.dtype is DType.FLOAT8_E4M3}
    layers, result = collect(tensors, ("weight", "weight_scale_inv"), "weight")
    for layer in layers:
        name = f"{layer.module}.weight"
        if name in eight_bits:
            result[name] = _weight(layer, config)
        else:
            result |= {f"{layer.module}.{ending}": tensor for ending, tensor in layer.tensors.items()}
    return {name: result[name] for name in tensors if name in result}


def _weight(layer: Parts, config: QuantizationConfig) -> LazyTensor:
    outputs, inputs = layer.matrix("weight", DType.FLOAT8_E4M3)
    height, width = _block(config, outputs, inputs)
    weight = layer.get("weight")
    shape = layer.get("weight_scale_inv").spec.shape
    if config.values.get("weight_block_size") is None and shape in ((), (1,), (1, 1), (outputs,), (outputs, 1)):
        height, width = (1, inputs) if outputs in shape and outputs > 1 else (outputs, inputs)
        scales = layer.shaped("weight_scale_inv", *shape, dtypes=SCALES)
    else:
        scales = layer.shaped("weight_scale_inv", -(-outputs // height), -(-inputs // width), dtypes=SCALES)

    def rows(start: int, stop: int) -> np.ndarray:
        blocks = scales.read().astype(np.float32).reshape(-1, -(-inputs // width))
        of_row = np.arange(start, stop) // height
        return e4m3_as_float(weight.read(start, stop)) * blocks[of_row].repeat(width, axis=1)[:, :inputs]

    return dense_tensor(f"{layer.module}.weight", (outputs, inputs), "FP8", rows, coarse=False)


def _block(config: QuantizationConfig, outputs: int, inputs: int) -> tuple[int, int]:
    block = config.values.get("weight_block_size")
    if block is None:
        return outputs, inputs
    if not (isinstance(block, list) and len(block) == 2 and all(type(item) is int and item > 0 for item in block)):
        raise config.bad("weight_block_size", block, "two whole numbers")
    return block[0], block[1]
