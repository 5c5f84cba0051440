"""Reads PyTorch weight files (`pytorch_model*.bin`), when torch is installed, without running code in them."""

from __future__ import annotations

from pathlib import Path

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.errors import BadInputError, TargetError
from trtllm.frontends.torch_tensors import lazy_torch_tensor


def open_torch_file(file: Path) -> dict[str, LazyTensor]:
    """The tensors of the state dict in `file`, mapped, not read.

    Raises TargetError without torch, BadInputError for a damaged file, for one that wants to run code, and for one
    that is no state dict.
    """
    try:
        import torch
    except ImportError:
        raise TargetError(
            f"{file} is a PyTorch file and torch is not installed",
            "install it (`pip install trtllm-toolchain[torch]`) or pass a checkpoint in safetensors",
        ) from None
    state = _load(file)
    if not isinstance(state, dict):
        raise BadInputError(f"{file} holds a {type(state).__name__}, expected a state dict", "fetch the model again")
    state = state.get("state_dict", state) if not any(torch.is_tensor(value) for value in state.values()) else state
    others = [name for name, value in state.items() if not torch.is_tensor(value)]
    if others:
        raise BadInputError(f"{file} holds '{others[0]}', which is no tensor", "pass a checkpoint of weights alone")
    return {name: lazy_torch_tensor(name, tensor) for name, tensor in state.items()}


def _load(file: Path) -> object:
    import pickle

    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError:
        raise BadInputError(
            f"{file} holds more than tensors, or is damaged: reading it could run code, so it was not read",
            "pass a checkpoint in safetensors, or convert this one where you trust it",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInputError(f"cannot read {file}: {reason}", "it is damaged or cut short; fetch it again") from None


def _is_zip(file: Path) -> bool:
    """Files written before torch 1.6 are plain pickles, which cannot be mapped."""
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"
