"""Views of lazy tensors: under another name, or as one matrix of a stack. Nothing is read to make them."""

from __future__ import annotations

from math import prod

import numpy as np

from trtllm.checkpoints.checkpoint import FunctionTensor, LazyTensor, TensorSpec
from trtllm.checkpoints.pruned import PrunedTensor, pruned_view
from trtllm.checkpoints.safetensors_file import SafetensorsTensor
from trtllm.checkpoints.stored import QuantizedTensor


def renamed(tensor: LazyTensor, name: str) -> LazyTensor:
    """The same tensor under another name."""
    spec = tensor.spec
    if spec.name == name:
        return tensor
    if isinstance(tensor, QuantizedTensor):
        return tensor.under(name)
    spec = TensorSpec(name, spec.shape, spec.dtype)
    if isinstance(tensor, SafetensorsTensor):
        return tensor.section(spec, 0)
    if isinstance(tensor, PrunedTensor):
        return pruned_view(spec, tensor.sha256)
    return FunctionTensor(spec, tensor.read)


def stack_rows(tensor: LazyTensor, name: str, index: int, first: int, rows: int) -> LazyTensor:
    """`tensor[index, first : first + rows]` of a stack of matrices as a tensor named `name`."""
    spec = TensorSpec(name, (rows, *tensor.spec.shape[2:]), tensor.spec.dtype)
    if isinstance(tensor, SafetensorsTensor):
        return tensor.section(spec, (index * tensor.spec.shape[1] + first) * prod(spec.shape[1:]))
    if isinstance(tensor, PrunedTensor):
        return pruned_view(spec)

    def read(start: int, stop: int) -> np.ndarray:
        return np.array(tensor.read(index, index + 1)[0, first + start : first + stop])

    return FunctionTensor(spec, read)
