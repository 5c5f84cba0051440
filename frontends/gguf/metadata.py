"""Typed access to a GGUF file's metadata, with errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm.errors import BadInputError, UnsupportedModelError


@dataclass(frozen=True, eq=False)
class Metadata:
    """The metadata of `path`; keys that belong to the architecture are given without its name."""

    path: Path
    values: Mapping[str, Any]
    prefix: str

    def integer(self, key: str) -> int:
        """A required count; per-layer lists of one value are that value."""
        value = self.optional_integer(key)
        if value is None:
            raise self._missing(key)
        return value

    def optional_integer(self, key: str) -> int | None:
        value = self.values.get(f"{self.prefix}.{key}")
        if isinstance(value, list) and value:
            if len(set(value)) > 1:
                raise UnsupportedModelError(
                    f"{self.path} has a '{self.prefix}.{key}' that differs between layers", "such models are not read"
                )
            value = value[0]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(key, value, "a count")
        return value

    def number(self, key: str) -> float:
        value = self.optional_number(key)
        if value is None:
            raise self._missing(key)
        return value

    def optional_number(self, key: str) -> float | None:
        value = self.values.get(f"{self.prefix}.{key}")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        return float(value)

    def text(self, key: str) -> str | None:
        value = self.values.get(f"{self.prefix}.{key}")
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.values.get(f"{self.prefix}.{key}")
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def sequence(self, key: str) -> list[Any] | None:
        value = self.values.get(f"{self.prefix}.{key}")
        if value is not None and not isinstance(value, list):
            raise self._wrong(key, value, "an array")
        return value

    def under(self, prefix: str) -> Metadata:
        """The same values with keys under another prefix."""
        return Metadata(self.path, self.values, prefix)

    def _missing(self, key: str) -> BadInputError:
        return BadInputError(
            f"{self.path} has no metadata key '{self.prefix}.{key}'", "the file is incomplete; convert the model again"
        )

    def _wrong(self, key: str, value: Any, expected: str) -> BadInputError:
        return BadInputError(
            f"{self.path} has {str(value)[:60]!r} under '{self.prefix}.{key}', expected {expected}",
            "the file is damaged; convert the model again",
        )
