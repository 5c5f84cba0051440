"""bitsandbytes: NF4 and FP4 in blocks of the flat weight, and 8 bits with a scale for each output.

4 bits: weight uint8 [N*K/2, 1], the high nibble first; weight.quant_map float32 [16], weight.absmax one a block, and a
tensor of JSON with shape and block size. Nested: absmax are bytes, looked up in weight.nested_quant_map, times
weight.nested_absmax of their blocks, plus an offset. 8 bits: weight int8 [N, K], SCB float32 [N]; weight * SCB / 127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.checkpoints.stored import IntegerBlocks
from trtllm.dtypes import DType
from trtllm.errors import BadInputError
from trtllm.frontends.quantized.config import QuantizationConfig
from trtllm.frontends.quantized.parts import Parts, collect, dense_tensor, integer_tensor

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_FOUR_BITS = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_FLOAT = (DType.FLOAT32,)


@dataclass(frozen=True)
class _State:
    """The JSON of a 4-bit weight."""

    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int = 0
    nested_offset: float = 0.0


def open_bitsandbytes(tensors: Mapping[str, LazyTensor], config: QuantizationConfig) -> dict[str, LazyTensor]:
    result = dict(tensors)
    for key in _STATES:
        layers, result = collect(result, (*_FOUR_BITS, key), key)
        for layer in layers:
            result[f"{layer.module}.weight"] = _four_bits(layer, key)
    layers, result = collect(result, ("weight", "SCB", "weight_format"), "SCB")
    for layer in layers:
        result[f"{layer.module}.weight"] = _eight_bits(layer)
    return {name: tensor for name, tensor in result.items() if not name.endswith(".weight_format")}


def _eight_bits(layer: Parts) -> LazyTensor:
    outputs, inputs = layer.matrix("weight", DType.INT8)
    weight, largest = layer.get("weight"), layer.shaped("SCB", outputs, dtypes=_FLOAT)

    def scales(start: int, stop: int) -> np.ndarray:
        return (largest.read(start, stop) / np.float32(127))[:, None]

    name = f"{layer.module}.weight"
    blocks = IntegerBlocks(weight.read, scales)
    return integer_tensor(name, (outputs, inputs), "bitsandbytes 8 bits", 8, inputs, DType.FLOAT32, blocks)


def _four_bits(layer: Parts, key: str) -> LazyTensor:
    state = _state(layer.get(key))
    elements = prod(state.shape)
    if elements % 2 or layer.get("weight").spec.nbytes * 2 != elements:
        raise BadInputError(
            f"tensor '{layer.get('weight').spec}' does not hold the {elements} elements of its quant_state",
            "the checkpoint is damaged; fetch it again",
        )
    weight = layer.shaped("weight", *layer.get("weight").spec.shape, dtypes=(DType.UINT8,))
    codes = layer.shaped("weight.quant_map", 16, dtypes=_FLOAT).read()
    largest = _largest(layer, state, -(-elements // state.blocksize))
    inputs = state.shape[1]

    def rows(start: int, stop: int) -> np.ndarray:
        first, last = start * inputs, stop * inputs
        packed = _bytes(weight, first // 2, -(-last // 2))
        nibbles = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[first % 2 : first % 2 + last - first]
        blocks = largest[np.arange(first, last) // state.blocksize]
        return (codes[nibbles] * blocks).reshape(stop - start, inputs)

    method = f"bitsandbytes {key.removeprefix('weight.quant_state.bitsandbytes__').upper()}"
    return dense_tensor(f"{layer.module}.weight", state.shape, method, rows, coarse=True)


def _bytes(weight: LazyTensor, start: int, stop: int) -> np.ndarray:
    """Bytes `start:stop` of the flat payload, which is stored as one column or one row."""
    is_column = weight.spec.shape[0] != 1
    return (weight.read(start, stop) if is_column else weight.read()[:, start:stop]).reshape(-1)


def _largest(layer: Parts, state: _State, blocks: int) -> np.ndarray:
    """float32 [blocks]."""
    if "weight.nested_absmax" not in layer:
        return layer.shaped("weight.absmax", blocks, dtypes=_FLOAT).read()
    if state.nested_blocksize <= 0:
        raise BadInputError(f"the quant_state of '{layer.module}' gives no nested_blocksize", "fetch the model again")
    outer = layer.shaped("weight.nested_absmax", -(-blocks // state.nested_blocksize), dtypes=_FLOAT).read()
    table = layer.shaped("weight.nested_quant_map", 256, dtypes=_FLOAT).read()
    codes = layer.shaped("weight.absmax", blocks, dtypes=(DType.UINT8,)).read()
    nested = table[codes] * outer[np.arange(blocks) // state.nested_blocksize]
    return nested + np.float32(state.nested_offset)


def _state(tensor: LazyTensor) -> _State:
    try:
        values = json.loads(tensor.read().tobytes())
        shape, blocksize = values["shape"], values["blocksize"]
        state = _State(
            (int(shape[0]), int(shape[1])),
            int(blocksize),
            int(values.get("nested_blocksize") or 0),
            float(values.get("nested_offset") or 0.0),
        )
        if len(shape) != 2 or min(*state.shape, state.blocksize) <= 0:
            raise ValueError("shape or blocksize")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadInputError(
            f"tensor '{tensor.spec.name}' describes no quantization: {error}",
            "the checkpoint is damaged; fetch it again",
        ) from None
    return state
