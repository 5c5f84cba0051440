"""compressed-tensors: integers packed along the inputs, int8 and E4M3 as they are, NVFP4 with a scale of the matrix.

Which of these a layer is, its tensors tell: weight_packed int32 with weight_shape, weight_packed uint8 with
weight_global_scale (which divides), weight int8 or E4M3, each with weight_scale. Packed integers count from 0 with a
middle of 2^(bits-1), zero points likewise, packed along the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

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
    dense_tensor,
    integer_tensor,
    rows_of,
    unpacked,
    words_of,
)
from trtllm.frontends.quantized.small_floats import e4m3_as_float, nvfp4_rows

_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mixed-precision", "dense",
)  # fmt: skip
_ENDINGS = (
    "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale",
    "weight",
)  # fmt: skip


def open_compressed_tensors(tensors: Mapping[str, LazyTensor], config: QuantizationConfig) -> dict[str, LazyTensor]:
    groups = _groups(config)
    for layout in {
        str(config.values.get("format") or "dense"),
        *(str(group.get("format") or "dense") for group in groups),
    }:
        if layout not in _FORMATS:
            raise config.unsupported(f"format '{layout}' (of its formats, {', '.join(_FORMATS)})")
    if (config.values.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise config.unsupported(f"sparsity format '{config.values['sparsity_config']['format']}'")
    if config.values.get("transform_config"):
        raise config.unsupported("a transform_config (rotated weights)")
    layers, result = collect(tensors, _ENDINGS, "weight_scale")
    stated = {(group.get("weights") or {}).get("num_bits") for group in groups}
    for layer in layers:
        result[f"{layer.module}.weight"] = _weight(layer, config, stated)
    orphans = [name for name in result if name.endswith(".weight_packed")]
    if orphans:
        raise BadInputError(
            f"'{orphans[0]}' has no weight_scale beside it", "the checkpoint is incomplete; fetch it again"
        )
    return result


def _groups(config: QuantizationConfig) -> list[Mapping[str, Any]]:
    groups = config.values.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise config.bad("config_groups", groups, "a map of groups")
    return list(groups.values())


def _weight(layer: Parts, config: QuantizationConfig, stated: set[Any]) -> LazyTensor:
    if "weight_packed" not in layer:
        dtype = layer.get("weight").spec.dtype
        return _float_weight(layer) if dtype is DType.FLOAT8_E4M3 else _integer_weight(layer)
    if layer.get("weight_packed").spec.dtype is DType.UINT8:
        return _nvfp4_weight(layer)
    return _packed_weight(layer, config, stated)


def _packed_weight(layer: Parts, config: QuantizationConfig, stated: set[Any]) -> LazyTensor:
    rows, words = layer.matrix("weight_packed", DType.INT32)
    outputs, inputs = _shape(layer)
    bits = next((bits for bits in (4, 8) if words == -(-inputs * bits // 32)), None)
    if rows != outputs or bits is None:
        raise BadInputError(
            f"tensor '{layer.get('weight_packed').spec}' does not hold {outputs}x{inputs} integers of 4 or 8 bits, "
            f"which '{layer.module}.weight_shape' names",
            "the checkpoint is damaged, or has integers of another width",
        )
    if isinstance(next(iter(stated), None), int) and bits not in stated:
        raise BadInputError(
            f"'{layer.module}' is packed in {bits} bits, the config of {config.source} says {sorted(stated)}",
            "the quantization config and the weights are of different models",
        )
    packed, scales, groups = layer.get("weight_packed"), *_scales(layer, outputs, inputs)
    middle = 1 << (bits - 1)
    zeros = _packed_zeros(layer, outputs, groups, bits)
    shift = 0 if zeros is not None and bits == 4 else middle

    def values(start: int, stop: int) -> np.ndarray:
        return (unpacked(words_of(packed, start, stop), bits)[:, :inputs] - np.uint8(shift)).view(np.int8)

    offsets = (lambda start, stop: zeros[start:stop] - np.float32(shift)) if zeros is not None else None
    blocks = IntegerBlocks(values, scales, offsets)
    held: Literal[4, 8] = 4 if bits == 4 else 8
    name, method = f"{layer.module}.weight", f"compressed-tensors {bits} bits"
    order = _group_order(layer, inputs, groups)
    if order is not None:
        method += " in activation order"
        return dense_tensor(name, (outputs, inputs), method, _in_order(blocks, order), coarse=bits == 4)
    offset = Offset.NONE if zeros is None else Offset.ZERO_POINT
    dtype = layer.get("weight_scale").spec.dtype
    return integer_tensor(name, (outputs, inputs), method, held, inputs // groups, dtype, blocks, offset)


def _in_order(blocks: IntegerBlocks, order: np.ndarray) -> Callable[[int, int], np.ndarray]:
    """Dequantized rows where each input names its group."""

    def rows(start: int, stop: int) -> np.ndarray:
        elements = blocks.values(start, stop).astype(np.float32)
        if blocks.offsets is not None:
            elements -= blocks.offsets(start, stop)[:, order]
        elements *= blocks.scales(start, stop)[:, order]
        return elements

    return rows


def _shape(layer: Parts) -> tuple[int, int]:
    stated = layer.shaped("weight_shape", 2, dtypes=(DType.INT64, DType.INT32)).read()
    if stated.min() <= 0:
        raise BadInputError(f"'{layer.module}.weight_shape' is {stated.tolist()}", "the checkpoint is damaged")
    return int(stated[0]), int(stated[1])


def _scales(layer: Parts, outputs: int, inputs: int) -> tuple[Callable[[int, int], np.ndarray], int]:
    """Scales by rows, and how many each row has. One scale for the whole matrix is one for each row."""
    tensor = layer.get("weight_scale")
    if tensor.spec.shape in ((), (1,), (1, 1)) and tensor.spec.dtype in SCALES:
        number = tensor.read().astype(np.float32).reshape(1, 1)
        return (lambda start, stop: number.repeat(stop - start, axis=0)), 1
    groups = tensor.spec.shape[-1] if len(tensor.spec.shape) == 2 else 1
    shape = (outputs, groups) if len(tensor.spec.shape) == 2 else (outputs,)
    layer.shaped("weight_scale", *shape, dtypes=SCALES)
    if groups == 0 or inputs % groups:
        raise BadInputError(
            f"tensor '{tensor.spec}' has {groups} groups for {inputs} inputs, which they do not divide",
            "the checkpoint is damaged, or its groups are of uneven size",
        )
    read = rows_of(tensor)
    return (lambda start, stop: read(start, stop).reshape(stop - start, groups)), groups


def _packed_zeros(layer: Parts, outputs: int, groups: int, bits: int) -> np.ndarray | None:
    """float32 [N, groups], counted as the stored integers are; None for a symmetric weight."""
    if "weight_zero_point" not in layer:
        return None
    tensor = layer.get("weight_zero_point")
    if tensor.spec.dtype is DType.INT8:
        layer.shaped("weight_zero_point", outputs, groups, dtypes=(DType.INT8,))
        return tensor.read().astype(np.float32) + np.float32(1 << (bits - 1))
    packed = layer.shaped("weight_zero_point", -(-outputs * bits // 32), groups, dtypes=(DType.INT32,))
    columns = np.ascontiguousarray(words_of(packed).T)
    return np.ascontiguousarray(unpacked(columns, bits)[:, :outputs].T).astype(np.float32)


def _group_order(layer: Parts, inputs: int, groups: int) -> np.ndarray | None:
    if "weight_g_idx" not in layer:
        return None
    order = layer.shaped("weight_g_idx", inputs, dtypes=(DType.INT32, DType.INT64)).read()
    if (order == -1).all() or np.array_equal(order, np.arange(inputs) // (inputs // groups)):
        return None
    if order.min() < 0 or order.max() >= groups:
        raise BadInputError(f"'{layer.module}.weight_g_idx' names groups out of {groups}", "the checkpoint is damaged")
    return order


def _integer_weight(layer: Parts) -> LazyTensor:
    outputs, inputs = layer.matrix("weight", DType.INT8)
    scales, groups = _scales(layer, outputs, inputs)
    weight = layer.get("weight")
    offsets = None
    if "weight_zero_point" in layer:
        shape = layer.get("weight_scale").spec.shape
        zeros = layer.shaped("weight_zero_point", *shape, dtypes=(DType.INT8,)).read().astype(np.float32)
        if zeros.any():
            spread = np.broadcast_to(zeros.reshape(-1, groups), (outputs, groups))
            offsets = lambda start, stop: spread[start:stop]  # noqa: E731
    blocks = IntegerBlocks(weight.read, scales, offsets)
    offset = Offset.NONE if offsets is None else Offset.ZERO_POINT
    dtype = layer.get("weight_scale").spec.dtype
    method = "compressed-tensors int8"
    return integer_tensor(
        f"{layer.module}.weight", (outputs, inputs), method, 8, inputs // groups, dtype, blocks, offset
    )


def _float_weight(layer: Parts) -> LazyTensor:
    outputs, inputs = layer.matrix("weight", DType.FLOAT8_E4M3)
    scales, groups = _scales(layer, outputs, inputs)
    weight = layer.get("weight")

    def rows(start: int, stop: int) -> np.ndarray:
        elements = e4m3_as_float(weight.read(start, stop)).reshape(stop - start, groups, -1)
        return (elements * scales(start, stop)[:, :, None]).reshape(stop - start, inputs)

    return dense_tensor(f"{layer.module}.weight", (outputs, inputs), "compressed-tensors FP8", rows, coarse=False)


def _nvfp4_weight(layer: Parts) -> LazyTensor:
    outputs, pairs = layer.matrix("weight_packed", DType.UINT8)
    inputs = 2 * pairs
    if inputs % 16:
        raise BadInputError(
            f"tensor '{layer.get('weight_packed').spec}' is no whole number of blocks", "fetch it again"
        )
    scales = layer.shaped("weight_scale", outputs, inputs // 16, dtypes=(DType.FLOAT8_E4M3,))
    shape = layer.get("weight_global_scale").spec.shape
    divisor = layer.shaped("weight_global_scale", *(shape if shape == () else (1,)), dtypes=(DType.FLOAT32,))
    number = np.float32(divisor.read().reshape(()))
    rows = nvfp4_rows(layer.get("weight_packed"), scales, lambda block: block / number)
    return dense_tensor(f"{layer.module}.weight", (outputs, inputs), "compressed-tensors NVFP4", rows, coarse=True)
