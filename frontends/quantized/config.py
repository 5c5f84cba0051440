"""The quantization part of a config, with checked look-ups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtllm.errors import BadInputError, UnsupportedModelError


@dataclass(frozen=True)
class QuantizationConfig:
    """`quantization_config` of config.json (for modelopt: `quantization` of hf_quant_config.json)."""

    method: str
    values: Mapping[str, Any]
    source: str

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number. Raises BadInputError."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(key, value, "a whole number")
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false. Raises BadInputError."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def group_size(self, inputs: int, module: str) -> int:
        """Inputs of a group; -1 stands for all of them. Raises BadInputError when it does not divide `module`'s."""
        size = self.integer("group_size", 128)
        size = inputs if size == -1 else size
        if size <= 0 or inputs % size:
            raise BadInputError(
                f"group_size {size} of {self.source} does not divide the {inputs} inputs of '{module}'",
                "the quantization config and the weights are of different models",
            )
        return size

    def bad(self, key: str, value: Any, wanted: str) -> BadInputError:
        return BadInputError(
            f"quantization_config of {self.source} has {key} {value!r}, {wanted} is expected",
            "the config is damaged; fetch the model again",
        )

    def unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.source} is quantized: quantization method '{self.method}' with {what} is not read",
            "pass the checkpoint before quantization (float32, float16 or bfloat16) and quantize in the build",
        )
