"""Presents GGUF tensors as lazy tensors: only the rows asked for are read and put in Hugging Face's layout.

Matrices of quantized types keep what they are stored as beside their dequantized rows.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from trtllm.checkpoints.checkpoint import FunctionTensor, LazyTensor, TensorSpec
from trtllm.checkpoints.stored import IntegerBlocks, QuantizedTensor
from trtllm.dtypes import DType
from trtllm.errors import UnsupportedModelError
from trtllm.frontends.gguf.blocks import BLOCK_TYPES, Part, part_rows, stored_quantization
from trtllm.frontends.gguf.container import GgufTensor

_PLAIN = {
    GGMLQuantizationType.F32: DType.FLOAT32, GGMLQuantizationType.F16: DType.FLOAT16,
    GGMLQuantizationType.BF16: DType.BFLOAT16, GGMLQuantizationType.F64: DType.FLOAT64,
    GGMLQuantizationType.I8: DType.INT8, GGMLQuantizationType.I16: DType.INT16,
    GGMLQuantizationType.I32: DType.INT32, GGMLQuantizationType.I64: DType.INT64,
}  # fmt: skip
_ELEMENTS_AT_ONCE = 4 << 20
"""Elements dequantized at a time: the package makes several arrays of that size on the way."""


def is_quantized(tensor: GgufTensor) -> bool:
    return tensor.kind not in _PLAIN


def check_readable(tensor: GgufTensor) -> None:
    """Raises UnsupportedModelError when the gguf package cannot dequantize the type of `tensor`."""
    if not is_quantized(tensor):
        return
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.kind][1]), dtype=np.uint8), tensor.kind)
    except NotImplementedError:
        raise UnsupportedModelError(
            f"tensor '{tensor.name}' in {tensor.file.path} is of type {tensor.kind.name}, which is not read",
            "convert the model to a common type such as Q8_0 or F16",
        ) from None


def as_stored(tensor: GgufTensor, name: str) -> LazyTensor:
    """`tensor` under `name`, in the file's layout."""
    if is_quantized(tensor) and len(tensor.shape) == 2:
        return _quantized(tensor, name, tensor.shape, lambda read: read)
    return FunctionTensor(_spec(tensor, name, tensor.shape), lambda start, stop: _rows(tensor, start, stop))


def expert(tensor: GgufTensor, name: str, index: int) -> LazyTensor:
    """Matrix `index` of a stack."""
    rows = tensor.shape[1]
    first = index * rows
    if is_quantized(tensor):
        return _quantized(
            tensor, name, tensor.shape[1:], lambda read: lambda start, stop: read(first + start, first + stop)
        )
    return FunctionTensor(
        _spec(tensor, name, tensor.shape[1:]),
        lambda start, stop: _matrix_rows(tensor, first + start, first + stop),
    )


def transposed(tensor: GgufTensor, name: str) -> LazyTensor:
    """The transpose of a matrix; each read reads the whole of it (GPT-2 alone needs this)."""

    def read(start: int, stop: int) -> np.ndarray:
        return np.array(_rows(tensor, 0, tensor.shape[0])[:, start:stop].T, order="C")

    return FunctionTensor(_spec(tensor, name, tensor.shape[::-1]), read)


def minus_one(tensor: GgufTensor, name: str) -> LazyTensor:
    """A norm whose stored weight is that of the Hugging Face model plus one."""

    def read(start: int, stop: int) -> np.ndarray:
        values = _rows(tensor, start, stop)
        return (values.astype(np.float32) - np.float32(1)).astype(values.dtype)

    return FunctionTensor(_spec(tensor, name, tensor.shape), read)


def rotary_halves(tensor: GgufTensor, name: str, head_size: int) -> LazyTensor:
    """Q or K whose rows of each head are interleaved pairs, as two halves (convert_hf_to_gguf's `permute` undone)."""
    if is_quantized(tensor) and len(tensor.shape) == 2:
        return _quantized(tensor, name, tensor.shape, lambda read: _halved(read, head_size))
    read = _halved(lambda start, stop: _rows(tensor, start, stop), head_size)
    return FunctionTensor(_spec(tensor, name, tensor.shape), read)


Rows = Callable[[int, int], np.ndarray]
"""Gives rows `start:stop` of some matrix."""


def _halved(read: Rows, head_size: int) -> Rows:
    """Rows of the heads as two halves, of a matrix that has them as interleaved pairs."""

    def halves(start: int, stop: int) -> np.ndarray:
        first = start // head_size * head_size
        last = -(-stop // head_size) * head_size
        stored = read(first, last)
        tail = stored.shape[1:]
        ordered = stored.reshape(-1, head_size // 2, 2, *tail).swapaxes(1, 2).reshape(stored.shape)
        return np.array(ordered[start - first : stop - first])

    return halves


def _quantized(
    tensor: GgufTensor, name: str, shape: tuple[int, ...], arranged: Callable[[Rows], Rows]
) -> QuantizedTensor:
    """A matrix of a quantized type; `arranged` puts the file's rows in order, whatever is read of them."""
    block_type = BLOCK_TYPES.get(tensor.kind)
    blocks = None
    if block_type is not None:
        minima = block_type.minima
        blocks = IntegerBlocks(
            arranged(_part(tensor, block_type.values)),
            arranged(_part(tensor, block_type.scales)),
            arranged(_part(tensor, minima)) if minima is not None else None,
        )
    dense = arranged(lambda start, stop: _matrix_rows(tensor, start, stop))
    return QuantizedTensor(_spec(tensor, name, shape), stored_quantization(tensor.kind), blocks, dense)


def _part(tensor: GgufTensor, part: Part) -> Rows:
    def read(start: int, stop: int) -> np.ndarray:
        payload = tensor.file.read(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
        return part_rows(part, payload.reshape(stop - start, tensor.row_bytes), tensor.kind)

    return read


def _spec(tensor: GgufTensor, name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, shape, _PLAIN.get(tensor.kind, DType.FLOAT32))


def _rows(tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
    """`start:stop` of the first axis."""
    if len(tensor.shape) == 1:
        return np.array(_matrix_rows(tensor, 0, 1)[0, start:stop])
    inner = prod(tensor.shape[1:-1])
    return _matrix_rows(tensor, start * inner, stop * inner).reshape(-1, *tensor.shape[1:])


def _matrix_rows(tensor: GgufTensor, start: int, stop: int) -> np.ndarray:
    """Rows `start:stop` of the tensor seen as a matrix [product of the leading axes, last axis]."""
    plain = _PLAIN.get(tensor.kind)
    if plain is not None:
        payload = tensor.file.read(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
        return payload.view(plain.numpy).reshape(stop - start, tensor.shape[-1])
    result = np.empty((stop - start, tensor.shape[-1]), dtype=np.float32)
    step = max(1, _ELEMENTS_AT_ONCE // max(1, tensor.shape[-1]))
    for low in range(start, stop, step):
        high = min(low + step, stop)
        payload = tensor.file.read(tensor.offset + low * tensor.row_bytes, (high - low) * tensor.row_bytes)
        result[low - start : high - start] = dequantize(payload.reshape(high - low, -1), tensor.kind)
    return result
