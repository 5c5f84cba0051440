"""Writes safetensors files tensor by tensor, hashing on the way: the library's own writer wants all of them in memory.

Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import TensorSpec
from trtllm.dtypes import DType
from trtllm.progress import Progress

_NAMES = {
    DType.FLOAT32: "F32", DType.FLOAT16: "F16", DType.BFLOAT16: "BF16", DType.FLOAT64: "F64",
    DType.FLOAT8_E4M3: "F8_E4M3", DType.FLOAT8_E5M2: "F8_E5M2", DType.INT64: "I64", DType.INT32: "I32",
    DType.INT16: "I16", DType.INT8: "I8", DType.UINT8: "U8", DType.BOOL: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor to be written: what it is, and its payload in pieces when its turn comes."""

    spec: TensorSpec
    chunks: Callable[[], Iterable[np.ndarray]]


@dataclass(frozen=True)
class WrittenFile:
    """sha256 in hex of a file and of each tensor's payload in it."""

    sha256: str
    tensors: Mapping[str, str] = field(default_factory=dict)


def write_safetensors(
    path: Path, tensors: Sequence[StoredTensor], progress: Progress, *, metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """Writes the tensors in their order, one piece in memory at a time."""
    whole, hashes = hashlib.sha256(), {}
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1, thread_name_prefix="hash-file") as hasher:
        header = _header([tensor.spec for tensor in tensors], metadata or {"format": "pt"})
        file.write(header)
        whole.update(header)
        for tensor in tensors:
            digest, nbytes = hashlib.sha256(), 0
            for piece in _pieces(tensor.chunks()):
                hashed = hasher.submit(whole.update, piece)
                digest.update(piece)
                _write(file, piece)
                hashed.result()
                nbytes += piece.nbytes
                progress.advance(piece.nbytes)
            assert nbytes == tensor.spec.nbytes, tensor.spec
            hashes[tensor.spec.name] = digest.hexdigest()
    return WrittenFile(whole.hexdigest(), hashes)


def _pieces(chunks: Iterable[np.ndarray]) -> Iterator[memoryview]:
    for chunk in chunks:
        if chunk.size:
            yield np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data


def _header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in specs:
        begin, end = end, end + spec.nbytes
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _write(file: Any, data: memoryview) -> None:
    while data.nbytes:
        data = data[file.write(data) :]
