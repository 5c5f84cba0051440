"""The calibration directory: one file a segment, chained by keys, so that a killed calibration goes on where it was."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from trtllm.checkpoints.checkpoint import FunctionTensor, LazyTensor, TensorSpec
from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.dtypes import DType
from trtllm.errors import BadInputError, ResourceError

VALUES, SCALES, RESCALED = ".quantized_values", ".quantized_scales", ".rescaled"
"""What is appended to a weight's name for its integers, their scales, and a norm that took up channel scales."""
COUNTED, MINIMA = ".counted_values", ".quantized_minima"
"""The same for integers of blocks with minima, and for these."""


class CalibrationRecord:
    """Results of segments, and the states that flow into the next one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"cannot make {folder}: {error}", "choose another calibration directory") from None

    def result(self, index: int, key: str) -> SafetensorsFile | None:
        """The file of a finished segment; None when it is not there or was made of something else."""
        path = self._result_path(index)
        if not path.is_file():
            return None
        try:
            file = SafetensorsFile(path)
        except BadInputError:
            return None
        return file if file.metadata.get("key") == key else None

    def write_result(self, index: int, key: str, tensors: Mapping[str, np.ndarray]) -> SafetensorsFile:
        from safetensors.numpy import save_file

        path = self._result_path(index)
        temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        save_file(dict(tensors), str(temporary), metadata={"key": key})
        os.replace(temporary, path)
        return SafetensorsFile(path)

    def states(self, key: str) -> np.ndarray | None:
        """States [rows, S, H] that the segment of this key leaves behind, mapped from disk."""
        path = self._states_path(key)
        return np.load(path, mmap_mode="r") if path.is_file() else None

    def new_states(self, shape: tuple[int, ...]) -> np.memmap:
        """States to be written row by row; they count when `keep_states` names them."""
        path = self.folder / f".states-{uuid.uuid4().hex}.npy"
        return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)

    def keep_states(self, states: np.memmap, key: str) -> np.ndarray:
        states.flush()
        os.replace(str(states.filename), self._states_path(key))
        kept = self.states(key)
        assert kept is not None
        return kept

    def drop_states(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._states_path(key).unlink()

    def sweep(self) -> None:
        """Removes what a killed calibration left half written."""
        for path in self.folder.glob(".states-*"):
            path.unlink(missing_ok=True)

    def _result_path(self, index: int) -> Path:
        return self.folder / f"segment-{index:04}.safetensors"

    def _states_path(self, key: str) -> Path:
        return self.folder / f"states-{key[:24]}.npy"


def chained_key(before: str, *parts: bytes | memoryview) -> str:
    """sha256 in hex of a key and what came to it."""
    digest = hashlib.sha256(before.encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def stored_tensor(file: SafetensorsFile, name: str, *, packs_int4: bool) -> LazyTensor:
    """A tensor of a result; bytes that hold pairs of int4 are presented as such."""
    tensor = file.tensor(name)
    if not packs_int4:
        return tensor
    spec = TensorSpec(name, (*tensor.spec.shape[:-1], 2 * tensor.spec.shape[-1]), DType.INT4)
    return FunctionTensor(spec, tensor.read)
