"""Reads the typed values of a GGUF header in order, and says where the file ends too early."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGUFValueType

from trtllm.errors import BadInputError

_FORMATS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i", GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}  # fmt: skip
_DEEPEST_NESTING = 4


class HeaderStream:
    """A cursor over the header of the GGUF file `path`, which is `size` bytes long."""

    def __init__(self, stream: BinaryIO, path: Path, size: int) -> None:
        self._stream = stream
        self._size = size
        self.path = path
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self._size - self.position:
            raise BadInputError(
                f"{self.path} is {self._size} bytes long, its header needs at least {self.position + count}",
                "the file is cut short or damaged; fetch it again",
            )
        data = self._stream.read(count)
        self.position += count
        return data

    def scalar(self, form: str) -> Any:
        """A little-endian number in the notation of `struct`."""
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        """A string: u64 length, then UTF-8."""
        start = self.position
        try:
            return self.take(self.scalar("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"has a string at byte {start} that is not UTF-8") from None

    def value(self) -> Any:
        """A metadata value: its type, then itself."""
        return self._value_of(self._kind(), nesting=0)

    def damaged(self, fault: str) -> BadInputError:
        return BadInputError(f"{self.path} {fault}", "the file is damaged; fetch it again")

    def _kind(self) -> GGUFValueType:
        start, number = self.position, self.scalar("I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.damaged(f"has a metadata value of type {number} at byte {start}") from None

    def _value_of(self, kind: GGUFValueType, nesting: int) -> Any:
        if kind is GGUFValueType.STRING:
            return self.text()
        if kind is GGUFValueType.ARRAY:
            return self._array(nesting)
        number = self.scalar(_FORMATS[kind])
        return _shortest(number) if kind is GGUFValueType.FLOAT32 else number

    def _array(self, nesting: int) -> list[Any]:
        if nesting >= _DEEPEST_NESTING:
            raise self.damaged("has arrays nested too deeply")
        kind, count = self._kind(), self.scalar("Q")
        if kind in _FORMATS:
            form = "<" + _FORMATS[kind]
            return np.frombuffer(self.take(count * struct.calcsize(form)), dtype=form).tolist()
        return [self._value_of(kind, nesting + 1) for _ in range(count)]


def _shortest(number: float) -> float:
    """The shortest decimal with the same float32: 1e-05, where the file's bits say 9.999999747378752e-06."""
    return float(str(np.float32(number)))
