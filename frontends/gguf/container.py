"""Parses a GGUF file: metadata, and where each tensor lies. It knows no model.

The gguf package's own reader maps the file and builds several objects a token; this one reads the header once and
leaves the payloads to pread (see `trtllm.checkpoints.file_reads`). Format: ggml/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from trtllm.checkpoints.file_reads import FileReads
from trtllm.errors import BadInputError, UnsupportedModelError
from trtllm.frontends.gguf.header_stream import HeaderStream

_VERSIONS = (2, 3)
_LARGEST_RANK = 4
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor as the file has it; `shape` outermost axis first."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    file: FileReads
    offset: int
    """Of the first byte, from the start of the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the last axis."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * block_bytes

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, eq=False)
class GgufContainer:
    """Metadata by key (arrays as lists, float32 as its shortest decimal) and tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def open_container(path: Path) -> GgufContainer:
    """Parses `path`. Raises BadInputError when it is damaged or cut short, UnsupportedModelError for its version."""
    file = FileReads(path)
    with path.open("rb", buffering=1 << 20) as raw:
        stream = HeaderStream(raw, path, file.size)
        _check_version(stream)
        tensor_count, value_count = stream.scalar("Q"), stream.scalar("Q")
        metadata = _read_metadata(stream, value_count)
        infos = [_read_info(stream) for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0:
            raise stream.damaged(f"has a general.alignment of {alignment!r}")
        data_start = -(-stream.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for info in infos:
        if info.name in tensors:
            raise stream.damaged(f"has tensor '{info.name}' twice")
        tensors[info.name] = _placed(info, file, data_start, alignment)
    _check_size(tensors, file, data_start)
    return GgufContainer(path, metadata, tensors)


@dataclass(frozen=True)
class _Info:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _check_version(stream: HeaderStream) -> None:
    magic = stream.take(4)
    if magic != b"GGUF":
        raise stream.damaged(f"begins with {magic!r}, a GGUF file begins with b'GGUF'")
    version = stream.scalar("I")
    if version not in _VERSIONS:
        big_endian = version & 0xFFFF == 0
        what = "is a big-endian GGUF file" if big_endian else f"is a GGUF file of version {version}"
        raise UnsupportedModelError(
            f"{stream.path} {what}; versions 2 and 3, little-endian, are read", "convert the model again"
        )


def _read_metadata(stream: HeaderStream, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = stream.text()
        if key in metadata:
            raise stream.damaged(f"has metadata key '{key}' twice")
        metadata[key] = stream.value()
    return metadata


def _read_info(stream: HeaderStream) -> _Info:
    name = stream.text()
    rank = stream.scalar("I")
    if not 1 <= rank <= _LARGEST_RANK:
        raise stream.damaged(f"gives tensor '{name}' {rank} axes")
    shape = tuple(stream.scalar("Q") for _ in range(rank))
    return _Info(name, shape[::-1], stream.scalar("I"), stream.scalar("Q"))


def _placed(info: _Info, file: FileReads, data_start: int, alignment: int) -> GgufTensor:
    try:
        kind = GGMLQuantizationType(info.kind)
    except ValueError:
        raise UnsupportedModelError(
            f"tensor '{info.name}' in {file.path} has ggml type {info.kind}, which the gguf package does not know",
            "update the gguf package, or convert the model to a common type such as Q8_0",
        ) from None
    block = GGML_QUANT_SIZES[kind][0]
    if info.shape[-1] % block:
        fault = f"has tensor '{info.name}' with rows of {info.shape[-1]} elements in blocks of {block} ({kind.name})"
    elif info.offset % alignment:
        fault = f"has tensor '{info.name}' at offset {info.offset}, which is no multiple of {alignment}"
    else:
        return GgufTensor(info.name, info.shape, kind, file, data_start + info.offset)
    raise BadInputError(f"{file.path} {fault}", "the file is damaged; fetch it again")


def _check_size(tensors: Mapping[str, GgufTensor], file: FileReads, data_start: int) -> None:
    last = max(tensors.values(), key=lambda tensor: tensor.offset + tensor.nbytes, default=None)
    expected = last.offset + last.nbytes if last else data_start
    if last and file.size < expected:
        raise BadInputError(
            f"{file.path} is {file.size} bytes long, tensor '{last.name}' ends at byte {expected}: it is cut short",
            "the download is incomplete; fetch the file again",
        )
