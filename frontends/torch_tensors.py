"""Presents torch tensors as lazy tensors: rows are copied out in storage form when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtllm.checkpoints.checkpoint import FunctionTensor, LazyTensor, TensorSpec
from trtllm.dtypes import DType
from trtllm.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch


def lazy_torch_tensor(name: str, tensor: torch.Tensor) -> LazyTensor:
    """`tensor` under `name`; it stays where it is (CPU, GPU or a mapped file) until its rows are read."""
    try:
        spec = TensorSpec(name, tuple(tensor.shape), DType.of(str(tensor.dtype)))
    except ValueError:
        raise UnsupportedModelError(
            f"tensor '{name}' has element type {tensor.dtype}, which is not read", "convert the model to bfloat16 first"
        ) from None

    def rows(start: int, stop: int) -> np.ndarray:
        part = tensor.detach()
        return _storage_form(part[start:stop] if part.ndim else part, spec.dtype)

    return FunctionTensor(spec, rows)


def _storage_form(part: torch.Tensor, dtype: DType) -> np.ndarray:
    """A fresh array of `part`; the types numpy lacks travel as bytes."""
    import torch

    array = part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.array(array).view(dtype.numpy).reshape(tuple(part.shape))
