"""ModelOpt (hf_quant_config.json): FP8, NVFP4 and 4-bit AWQ, told apart by each layer's tensors.

FP8: weight E4M3 [N, K], weight_scale float32, one or one an output. NVFP4: weight uint8 [N, K/2], weight_scale E4M3
[N, K/16], weight_scale_2 float32, which multiplies. AWQ: weight uint8 [N/2, K], two outputs a byte, the even one in the
low nibble, two's complement; weight_scale [N, K/g]; pre_quant_scale [K] (optional) multiplies the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.checkpoints.stored import IntegerBlocks, IntegerForm, dequantized
from trtllm.dtypes import DType
from trtllm.errors import BadInputError
from trtllm.frontends.quantized.config import QuantizationConfig
from trtllm.frontends.quantized.parts import SCALES, Parts, collect, dense_tensor, integer_tensor, rows_of
from trtllm.frontends.quantized.small_floats import e4m3_as_float, nvfp4_rows

Rows = Callable[[int, int], np.ndarray]
_ALGORITHMS = ("FP8", "NVFP4", "W4A16_AWQ", "MIXED_PRECISION")
_ENDINGS = ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale")


def open_modelopt(tensors: Mapping[str, LazyTensor], config: QuantizationConfig) -> dict[str, LazyTensor]:
    algorithm = config.values.get("quant_algo")
    if algorithm not in _ALGORITHMS:
        raise config.unsupported(f"quant_algo {algorithm} (of its algorithms, {', '.join(_ALGORITHMS)})")
    layers, result = collect(tensors, _ENDINGS, "weight_scale")
    for layer in layers:
        result[f"{layer.module}.weight"] = _weight(layer)
    return result


def _weight(layer: Parts) -> LazyTensor:
    dtype = layer.get("weight").spec.dtype
    if dtype is DType.FLOAT8_E4M3:
        return _fp8(layer)
    if dtype is DType.UINT8 and layer.get("weight_scale").spec.dtype is DType.FLOAT8_E4M3:
        return _nvfp4(layer)
    if dtype is DType.UINT8:
        return _awq(layer)
    raise BadInputError(
        f"tensor '{layer.get('weight').spec}' has a weight_scale but is neither E4M3 nor packed 4 bits",
        "the checkpoint is damaged, or of a newer ModelOpt",
    )


def _fp8(layer: Parts) -> LazyTensor:
    outputs, inputs = layer.matrix("weight", DType.FLOAT8_E4M3)
    shape = layer.get("weight_scale").spec.shape
    wanted = shape if shape in ((), (1,), (outputs, 1)) else (outputs,)
    scales = layer.shaped("weight_scale", *wanted, dtypes=SCALES).read().astype(np.float32).reshape(-1, 1)
    spread, weight = np.broadcast_to(scales, (outputs, 1)), layer.get("weight")

    def rows(start: int, stop: int) -> np.ndarray:
        return e4m3_as_float(weight.read(start, stop)) * spread[start:stop]

    return _finished(layer, (outputs, inputs), "ModelOpt FP8", rows, coarse=False)


def _nvfp4(layer: Parts) -> LazyTensor:
    outputs, pairs = layer.matrix("weight", DType.UINT8)
    inputs = 2 * pairs
    if inputs % 16:
        raise BadInputError(f"tensor '{layer.get('weight').spec}' is no whole number of blocks", "fetch it again")
    scales = layer.shaped("weight_scale", outputs, inputs // 16, dtypes=(DType.FLOAT8_E4M3,))
    shape = layer.get("weight_scale_2").spec.shape
    factor = layer.shaped("weight_scale_2", *(shape if shape == () else (1,)), dtypes=(DType.FLOAT32,)).read()
    number = np.float32(factor.reshape(()))
    rows = nvfp4_rows(layer.get("weight"), scales, lambda block: block * number)
    return _finished(layer, (outputs, inputs), "ModelOpt NVFP4", rows, coarse=True)


def _awq(layer: Parts) -> LazyTensor:
    halves, inputs = layer.matrix("weight", DType.UINT8)
    outputs, packed = 2 * halves, layer.get("weight")
    shape = layer.get("weight_scale").spec.shape
    groups = shape[-1] if len(shape) == 2 else 1
    layer.shaped("weight_scale", *((outputs, groups) if len(shape) == 2 else (outputs,)), dtypes=SCALES)
    factor = np.float32(1)
    if "weight_scale_2" in layer:
        tensor = layer.get("weight_scale_2")
        shape_2 = tensor.spec.shape if tensor.spec.shape == () else (1,)
        factor = np.float32(
            layer.shaped("weight_scale_2", *shape_2, dtypes=SCALES).read().astype(np.float32).reshape(())
        )
    if groups == 0 or inputs % groups:
        raise BadInputError(
            f"tensor '{layer.get('weight_scale').spec}' has {groups} groups, which do not divide {inputs} inputs",
            "the checkpoint is damaged",
        )
    read = rows_of(layer.get("weight_scale"))

    def values(start: int, stop: int) -> np.ndarray:
        pairs = packed.read(start // 2, -(-stop // 2))
        signed = np.stack([(pairs << 4).view(np.int8) >> 4, pairs.view(np.int8) >> 4], axis=1)
        return np.ascontiguousarray(signed.reshape(-1, inputs)[start % 2 : start % 2 + stop - start])

    def scales(start: int, stop: int) -> np.ndarray:
        return read(start, stop).reshape(stop - start, groups) * factor

    blocks, group, method = IntegerBlocks(values, scales), inputs // groups, "ModelOpt W4A16_AWQ"
    dtype = layer.get("weight_scale").spec.dtype if factor == 1 else DType.FLOAT32
    if "pre_quant_scale" not in layer:
        return integer_tensor(f"{layer.module}.weight", (outputs, inputs), method, 4, group, dtype, blocks)
    form = IntegerForm(4, group)
    return _finished(
        layer, (outputs, inputs), method, lambda start, stop: dequantized(blocks, form, start, stop), coarse=True
    )


def _finished(layer: Parts, shape: tuple[int, int], method: str, rows: Rows, *, coarse: bool) -> LazyTensor:
    """The weight with the scales of its inputs, where it has any, multiplied in."""
    if "pre_quant_scale" not in layer:
        return dense_tensor(f"{layer.module}.weight", shape, method, rows, coarse=coarse)
    columns = layer.shaped("pre_quant_scale", shape[1], dtypes=SCALES).read().astype(np.float32)
    return dense_tensor(
        f"{layer.module}.weight",
        shape,
        f"{method} with scaled inputs",
        lambda start, stop: rows(start, stop) * columns,
        coarse=coarse,
    )
