"""What an engine kind can run, as data: passes and planners read this table and never ask for a target's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trtllm.dtypes import DType

TARGET_OPTIONS = (
    "strip_plan", "weight_streaming", "profiling_verbosity", "builder_optimization_level", "compute_capabilities",
    "kv_cache_quant_algo", "activation_bits", "tensorrt_version", "tensorrt_decode_batches", "tensorrt_prefill_lengths",
    "tensorrt_table_lengths", "tensorrt_cache_blocks", "tensorrt_workspace_mb", "version_compatible",
    "hardware_compatibility_level",
)  # fmt: skip
"""Fields of BuildConfig that speak to one kind of engine."""


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
    scheme_capabilities: Mapping[str, int] = field(default_factory=dict)
    """Of schemes that need a kind of GPU: the first compute capability that has it, as 89."""
    external_weights: bool = False
    """Whether weights stay outside the engine file, so that they can be read by mapping and replaced."""
    packed_int4: bool = False
    """Whether block-quantized weights feed a fused matrix product (MatMulNBits) instead of a dequantization."""
    supports_softcap: bool = True
    """Whether the standard Attention operator may carry a softcap."""
    static_cache: bool = True
    """Whether the cache length must be a constant of the graph."""
    lists_every_operator: bool = False
    """Whether what `operators` leaves out cannot run; otherwise every standard operator runs too."""
    value_dtypes: frozenset[DType] | None = None
    """Types that values of the graph may have; None when any may."""
    gathers_cache: bool = False
    """Whether the cache is read through block tables inside the graph and only new keys and values leave it, because
    no operator extends a cache in place."""
    narrows_integers: bool = False
    """Whether int64 values become int32, since the engine indexes by no others: inputs and outputs are int32 then."""
    symbols: frozenset[str] | None = None
    """Names of the extents of inputs that may vary from step to step; None when any may."""
    options: Mapping[str, frozenset[str] | None] = field(default_factory=dict)
    """Options of the build that only some targets honour, with the values they take (None: any).

    A build that sets another one of `TARGET_OPTIONS` is refused.
    """
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Why an option or a value of one is refused, where the reason helps."""

    release: str = ""
    """The versions of its library that the table is of, for people; empty where there is one table."""

    def has(self, op_type: str, domain: str = "") -> bool:
        return f"{domain}::{op_type}" in self.operators
