"""What an engine kind can run, as data: passes and planners read this table and never ask for a target's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trtllm.dtypes import DType


@dataclass(frozen=True)
class Capabilities:
    """The capability table of one target."""

    target: str
    operators: frozenset[str]
    """Operators that the engine runs, as "domain::Type" ("::MatMul", "com.microsoft::GroupQueryAttention")."""
    compute_dtypes: tuple[DType, ...]
    """Types the graph may compute in; the first is what dtype 'auto' gives."""
    schemes: frozenset[str]
    """Quantization schemes by name."""
    dtype_fallbacks: Mapping[DType, DType] = field(default_factory=dict)
    """A type that a user may ask for and the type it becomes, with a note."""
    external_weights: bool = False
    """Whether weights stay outside the engine file, so that they can be read by mapping and replaced."""
    packed_int4: bool = False
    """Whether block-quantized weights feed a fused matrix product (MatMulNBits) instead of a dequantization."""
    supports_softcap: bool = True
    """Whether the standard Attention operator may carry a softcap."""
    static_cache: bool = True
    """Whether the cache length must be a constant of the graph."""

    def has(self, op_type: str, domain: str = "") -> bool:
        return f"{domain}::{op_type}" in self.operators
