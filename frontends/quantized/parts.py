"""The parts that make up one quantized weight: collecting them, checking their shapes, unpacking their bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor, TensorSpec
from trtllm.checkpoints.stored import (
    BLOCK,
    IntegerBlocks,
    IntegerForm,
    Offset,
    QuantizedTensor,
    StoredQuantization,
    dequantized,
)
from trtllm.dtypes import DType
from trtllm.errors import BadInputError

_DAMAGED = "the checkpoint is damaged or incomplete; fetch it again"


class Parts:
    """The tensors of one linear layer by their ending; `module` is its name."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.tensors: dict[str, LazyTensor] = {}

    def __contains__(self, ending: str) -> bool:
        return ending in self.tensors

    def get(self, ending: str) -> LazyTensor:
        """The part; raises BadInputError when it is missing."""
        if ending not in self.tensors:
            held = ", ".join(self.tensors)
            raise BadInputError(f"'{self.module}' has {held} but no '{self.module}.{ending}'", _DAMAGED)
        return self.tensors[ending]

    def shaped(self, ending: str, *shape: int, dtypes: Iterable[DType]) -> LazyTensor:
        """The part, checked: raises BadInputError for another shape or type."""
        tensor = self.get(ending)
        expected = TensorSpec(tensor.spec.name, shape, tensor.spec.dtype)
        if tensor.spec.dtype not in dtypes or tensor.spec.shape != shape:
            types = " or ".join(dtype.value for dtype in dtypes)
            raise BadInputError(
                f"tensor '{tensor.spec}' does not fit: the parts of '{self.module}' imply {types}"
                f"[{'x'.join(map(str, expected.shape))}]",
                "the quantization config and the weights are of different models, or the checkpoint is damaged",
            )
        return tensor

    def matrix(self, ending: str, dtype: DType) -> tuple[int, int]:
        """The extents of a part that must be a matrix of `dtype`."""
        tensor = self.get(ending)
        if tensor.spec.dtype is not dtype or len(tensor.spec.shape) != 2 or 0 in tensor.spec.shape:
            raise BadInputError(f"tensor '{tensor.spec}' is no matrix of {dtype.value}", _DAMAGED)
        return tensor.spec.shape[0], tensor.spec.shape[1]


SCALES = (DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32)


def collect(
    tensors: Mapping[str, LazyTensor], endings: Iterable[str], key: str
) -> tuple[list[Parts], dict[str, LazyTensor]]:
    """Layers that have the part `key`, with those of their tensors that end in one of `endings`; and all the rest."""
    modules = {
        name.removesuffix(f".{key}"): Parts(name.removesuffix(f".{key}"))
        for name in tensors
        if name.endswith(f".{key}")
    }
    endings = tuple(endings)
    rest = {}
    for name, tensor in tensors.items():
        ending = next((ending for ending in endings if name.endswith(f".{ending}")), None)
        module = name.removesuffix(f".{ending}") if ending else ""
        if ending and module in modules:
            modules[module].tensors[ending] = tensor
        else:
            rest[name] = tensor
    return list(modules.values()), rest


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 [n, words] as uint8 [n, words * 32 / bits]: numbers of `bits` one after the other from the low bit on.

    Three bits run across words, 32 numbers in three of them.
    """
    period = 3 if bits == 3 else 1
    count = 32 * period // bits
    result = np.empty((len(words), words.shape[1] // period, count), np.uint8)
    for index in range(count):
        word, shift = divmod(index * bits, 32)
        numbers = words[:, word::period] >> np.uint32(shift)
        if shift + bits > 32:
            numbers = numbers | (words[:, word + 1 :: period] << np.uint32(32 - shift))
        result[:, :, index] = numbers & np.uint32((1 << bits) - 1)
    return result.reshape(len(words), -1)


def words_of(tensor: LazyTensor, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of an int32 tensor as uint32."""
    return tensor.read(start, stop).view(np.uint32)


def integer_tensor(
    name: str,
    shape: tuple[int, int],
    method: str,
    bits: Literal[4, 8],
    group_size: int,
    scale_dtype: DType,
    blocks: IntegerBlocks,
    offset: Offset = Offset.NONE,
) -> QuantizedTensor:
    """A weight of integers in groups. Groups that blocks of 32 do not tile leave it without integer form."""
    spec = TensorSpec(name, shape, DType.FLOAT32)
    form = IntegerForm(bits, group_size, offset, scale_dtype)
    if group_size % BLOCK == 0:
        return QuantizedTensor(spec, StoredQuantization(method, form), blocks)
    return dense_tensor(
        name, shape, method, lambda start, stop: dequantized(blocks, form, start, stop), coarse=bits == 4
    )


def dense_tensor(
    name: str, shape: tuple[int, int], method: str, rows: Callable[[int, int], np.ndarray], *, coarse: bool
) -> QuantizedTensor:
    """A weight that only its dequantized rows express."""
    spec = TensorSpec(name, shape, DType.FLOAT32)
    return QuantizedTensor(spec, StoredQuantization(method, None, coarse=coarse), None, rows)


def columns_of(tensor: LazyTensor) -> Callable[[int, int], np.ndarray]:
    """Columns `start:stop` of a matrix of scales [groups, N] as float32 rows [columns, groups]."""
    return lambda start, stop: np.ascontiguousarray(tensor.read()[:, start:stop].T).astype(np.float32)


def rows_of(tensor: LazyTensor) -> Callable[[int, int], np.ndarray]:
    """Rows `start:stop` of a matrix of scales [N, groups] as float32."""
    return lambda start, stop: tensor.read(start, stop).astype(np.float32)
