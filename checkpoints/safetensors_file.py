"""Reads safetensors files: the header is parsed and checked here, rows are read on demand with pread.

Neither mmap nor the library's `safe_open` is used, because both map the file, mapped pages count as resident memory,
and the peak of a build must stay under 3 GB on a 16 GB checkpoint. Writing is left to the safetensors library.
Format: https://huggingface.co/docs/safetensors (u64 header length, JSON header, one gapless buffer of tensors).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor, TensorSpec
from trtllm.checkpoints.file_reads import FileReads
from trtllm.dtypes import DType
from trtllm.errors import BadInputError, UnsupportedModelError

_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000
"""The limit of the reference implementation."""
_FETCH_AGAIN = "the file is damaged or of another format; fetch it again"


@dataclass(frozen=True, eq=False)
class SafetensorsTensor:
    """A tensor in a safetensors file; reading is thread safe."""

    spec: TensorSpec
    file: FileReads
    offset: int
    """Of the first byte, from the start of the file."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._rows(start, stop, self.file.read)

    def borrow(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As `read`, but it may be read-only and must be let go of soon; see `FileReads.borrow`."""
        is_aligned = self.offset % self.spec.dtype.numpy.itemsize == 0
        return self._rows(start, stop, self.file.borrow if is_aligned else self.file.read)

    def _rows(self, start: int, stop: int | None, read: Callable[[int, int], np.ndarray]) -> np.ndarray:
        shape = self.spec.shape
        if not shape:
            return read(self.offset, self.spec.nbytes).view(self.spec.dtype.numpy).reshape(())
        start, stop, _ = slice(start, stop).indices(shape[0])
        rows = max(stop - start, 0)
        row_bytes = self.spec.dtype.byte_size(prod(shape[1:]))
        payload = read(self.offset + start * row_bytes, rows * row_bytes)
        return payload.view(self.spec.dtype.numpy).reshape(rows, *shape[1:])

    def section(self, spec: TensorSpec, first_element: int) -> SafetensorsTensor:
        """The elements from `first_element` on, row-major, as a tensor of its own: one expert of a stack."""
        return SafetensorsTensor(spec, self.file, self.offset + spec.dtype.byte_size(first_element))


class SafetensorsFile:
    """One safetensors file: `specs` without reading payloads, `tensor(name)` for a lazy tensor.

    Raises BadInputError for a file that is cut short, has a damaged header, or tensors that overlap, leave gaps or
    disagree with their byte ranges; UnsupportedModelError for an element type that has no numpy form here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = FileReads(self.path)
        header = self._read_header()
        self.metadata: Mapping[str, str] = self._checked_metadata(header.pop("__metadata__", {}))
        ranges = {name: self._checked_entry(name, entry) for name, entry in header.items()}
        self._check_coverage(ranges)
        self._tensors = {
            name: SafetensorsTensor(spec, self._file, self._data_start + begin)
            for name, (spec, begin, _) in ranges.items()
        }

        self.specs: Mapping[str, TensorSpec] = {name: tensor.spec for name, tensor in self._tensors.items()}
        """Specs by tensor name, in the order of the header."""

    def tensor(self, name: str) -> LazyTensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise BadInputError(f"{self.path} has no tensor '{name}'", "the checkpoint is incomplete") from None

    def _read_header(self) -> dict[str, Any]:
        size = self._file.size
        if size < _LENGTH_BYTES:
            self._refuse(f"is {size} bytes long, a safetensors file has at least {_LENGTH_BYTES}")
        length = int.from_bytes(self._file.read(0, _LENGTH_BYTES).tobytes(), "little")
        if length > _LARGEST_HEADER:
            self._refuse(f"claims a header of {length} bytes, the format allows {_LARGEST_HEADER}")
        self._data_start = _LENGTH_BYTES + length
        if size < self._data_start:
            self._refuse(f"is {size} bytes long, its header alone ends at byte {self._data_start}")
        try:
            header = json.loads(
                self._file.read(_LENGTH_BYTES, length).tobytes().decode("utf-8"), object_pairs_hook=_unique
            )
        except (ValueError, RecursionError) as error:
            self._refuse(f"has a header that is not JSON: {error}")
        if not isinstance(header, dict):
            self._refuse("has a header that is not a JSON object")
        return header

    def _checked_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._refuse("has a '__metadata__' that is not a map of strings")
        return metadata

    def _checked_entry(self, name: str, entry: Any) -> tuple[TensorSpec, int, int]:
        """The spec and the byte range in the buffer, from which all other checks follow."""
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            self._refuse(f"describes tensor '{name}' by {_excerpt(entry)}, expected dtype, shape and data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _are_counts(shape):
            self._refuse(f"gives tensor '{name}' the shape {_excerpt(shape)}")
        if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self._refuse(f"gives tensor '{name}' the data_offsets {_excerpt(offsets)}")
        spec = TensorSpec(name, tuple(shape), self._dtype(name, entry["dtype"]))
        begin, end = offsets
        if end - begin != spec.nbytes:
            self._refuse(f"gives tensor '{spec}' {end - begin} bytes, its shape and dtype need {spec.nbytes}")
        return spec, begin, end

    def _dtype(self, name: str, text: Any) -> DType:
        try:
            return DType.of(str(text))
        except ValueError:
            raise UnsupportedModelError(
                f"tensor '{name}' in {self.path} has element type {_excerpt(text)}",
                f"types that are read: {', '.join(dtype.value for dtype in DType if dtype is not DType.INT4)}",
            ) from None

    def _check_coverage(self, ranges: Mapping[str, tuple[TensorSpec, int, int]]) -> None:
        """The buffer must be covered from its first to its last byte, without overlap."""
        position = 0
        for spec, begin, end in sorted(ranges.values(), key=lambda item: item[1:]):
            if begin != position:
                fault = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
                self._refuse(f"has tensor '{spec.name}' at buffer byte {begin}, where {position} was due: it {fault}")
            position = end
        expected = self._data_start + position
        if self._file.size != expected:
            difference = "cut short" if self._file.size < expected else "followed by bytes that no tensor owns"
            self._refuse(f"is {self._file.size} bytes long, its header describes {expected}: it is {difference}")

    def _refuse(self, fault: str) -> NoReturn:
        raise BadInputError(f"{self.path} {fault}", _FETCH_AGAIN)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{repeated}' occurs twice")
    return result


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _excerpt(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
