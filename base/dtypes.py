"""Element types: one closed set with sizes, numpy forms, and the spellings of the formats we read."""

from __future__ import annotations

import enum
from functools import cache
from typing import Any

import numpy as np


class DType(enum.Enum):
    """An element type; the value is its name in configs, manifests and messages."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    FLOAT64 = "float64"
    FLOAT8_E4M3 = "float8_e4m3fn"
    FLOAT8_E5M2 = "float8_e5m2"
    INT64 = "int64"
    INT32 = "int32"
    INT16 = "int16"
    INT8 = "int8"
    UINT8 = "uint8"
    BOOL = "bool"
    INT4 = "int4"
    """Two's complement, two elements a byte, the even element in the low nibble (the ONNX packing)."""

    @property
    def bits(self) -> int:
        """Bits an element takes in storage."""
        return _BITS[self]

    def byte_size(self, elements: int) -> int:
        """Bytes that `elements` elements take in storage."""
        return (elements * self.bits + 7) // 8

    @property
    def is_float(self) -> bool:
        return self.value.startswith(("float", "bfloat"))

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype of the *storage form*: int4 is stored as uint8 pairs."""
        return _numpy(self)

    @staticmethod
    def of(name: str) -> DType:
        """The type that a config names: "float16", "fp16", "half", "torch.bfloat16", "F32" ..."""
        key = name.lower().removeprefix("torch.")
        try:
            return DType(_ALIASES.get(key, key))
        except ValueError:
            raise ValueError(f"unknown dtype '{name}'") from None

    @staticmethod
    def of_numpy(dtype: np.dtype[Any]) -> DType:
        return DType(dtype.name)


_BITS = {
    DType.FLOAT32: 32, DType.FLOAT16: 16, DType.BFLOAT16: 16, DType.FLOAT64: 64,
    DType.FLOAT8_E4M3: 8, DType.FLOAT8_E5M2: 8,
    DType.INT64: 64, DType.INT32: 32, DType.INT16: 16, DType.INT8: 8, DType.UINT8: 8,
    DType.BOOL: 8, DType.INT4: 4,
}  # fmt: skip

_ALIASES = {
    "fp32": "float32", "float": "float32", "f32": "float32",
    "fp16": "float16", "half": "float16", "f16": "float16",
    "bf16": "bfloat16", "f64": "float64", "double": "float64",
    "f8_e4m3": "float8_e4m3fn", "f8_e5m2": "float8_e5m2", "fp8": "float8_e4m3fn",
    "i64": "int64", "i32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8",
}  # fmt: skip


@cache
def _numpy(dtype: DType) -> np.dtype[Any]:
    if dtype is DType.INT4:
        return np.dtype(np.uint8)
    if dtype in (DType.BFLOAT16, DType.FLOAT8_E4M3, DType.FLOAT8_E5M2):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, dtype.value))
    return np.dtype(dtype.value)
