"""What the plans of each TensorRT version run, as capability tables. They need no library.

The versions without a layer that extends a cache in place read it through block tables (`passes/gather_cache.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.compiler.targets.tensorrt.library import load
from trtllm.compiler.targets.tensorrt.operators.table import OPERATORS
from trtllm.compiler.targets.tensorrt.profiles import SYMBOLS
from trtllm.compiler.targets.tensorrt.versions import FULL_NAME, RTX_NAME, TensorRtVersion, parse_version
from trtllm.dtypes import DType
from trtllm.errors import TargetError, UsageError

SCHEME_CAPABILITIES = {
    "FP8": 89,
    "NVFP4": 120,
    "W4A16_MXFP4": 120,
    "W8A8_SQ_PER_CHANNEL": 75,
    "W8A8_SQ_PER_TENSOR_PLUGIN": 75,
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": 75,
}
"""The first GPUs that multiply in a scheme's format. Scales of single tokens and of 128 x 128 blocks have no layer."""

_INT8_PRODUCTS = {name: 75 for name in SCHEME_CAPABILITIES if name.startswith("W8A8")}
"""Schemes of int8 weights and activations with a scale of their tensor: quantization layers around a product."""
TRANSFORMER_LAYERS = frozenset({"::RotaryEmbedding", "::TensorScatter", "::Attention"})
"""Operators that came with the layers of a transformer, in 10.15."""
_PRIMITIVES = frozenset(OPERATORS) - TRANSFORMER_LAYERS - {"::DequantizeLinear"}
"""What came before: products of int8 with one scale are there, dequantization of blocks is not."""
_BUILDER_OPTIONS: Mapping[str, None] = {
    "profiling_verbosity": None,
    "builder_optimization_level": None,
    "tensorrt_workspace_mb": None,
    "tensorrt_version": None,
}
_FIXED_SHAPES: Mapping[str, None] = {
    "tensorrt_decode_batches": None,
    "tensorrt_prefill_lengths": None,
    "tensorrt_table_lengths": None,
    "tensorrt_cache_blocks": None,
}
_GATHERED_CACHE = {
    "kv_cache_quant_algo": "keys and values are stored as the graph computes",
    "compute_capabilities": "a plan is for the GPU that it is built on; see hardware_compatibility_level",
}

CAPABILITIES = Capabilities(
    target="tensorrt",
    release="TensorRT-RTX 1.7",
    operators=frozenset(OPERATORS),
    lists_every_operator=True,
    compute_dtypes=(DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32),
    schemes=frozenset({"W8A16", "W4A16", *SCHEME_CAPABILITIES}),
    scheme_capabilities=SCHEME_CAPABILITIES,
    supports_softcap=False,
    value_dtypes=frozenset(
        {
            DType.FLOAT32, DType.FLOAT16, DType.BFLOAT16, DType.INT64, DType.INT32, DType.INT8, DType.INT4,
            DType.BOOL, DType.UINT8, DType.FLOAT8_E4M3,
        }
    ),
    symbols=frozenset(SYMBOLS),
    options={
        "weight_streaming": None,
        "compute_capabilities": frozenset({"75", "80", "86", "89", "120", "121"}),
        **_BUILDER_OPTIONS,
    },
    refusals={
        "kv_cache_quant_algo": "its layer that extends the cache in place has no quantized form that attention reads",
        "strip_plan": "without a GPU TensorRT-RTX 1.7 fails to build plans without weights",
        "compute_capabilities 90": "TensorRT-RTX does not run on H100 and H200",
        "compute_capabilities 9.0": "TensorRT-RTX does not run on H100 and H200; write 8.6 as 86",
        "version_compatible": "without a GPU TensorRT-RTX 1.7 fails to build such plans",
    },
)  # fmt: skip
"""TensorRT-RTX 1.x: builds without a GPU, has no plugins, refits on a GPU only."""

TENSORRT_8_6 = Capabilities(
    target="tensorrt",
    release="TensorRT 8.6 to 8.x",
    operators=_PRIMITIVES,
    lists_every_operator=True,
    compute_dtypes=(DType.FLOAT16, DType.FLOAT32),
    # The first two are stored as what they stand for; see `passes/widen_weights.py`.
    schemes=frozenset({"W8A16", "W4A16", *_INT8_PRODUCTS}),
    supports_softcap=False,
    gathers_cache=True,
    narrows_integers=True,
    # Integers inside the graph are ONNX's int64; they become int32 on their way into the library.
    value_dtypes=frozenset({DType.FLOAT32, DType.FLOAT16, DType.INT64, DType.INT32, DType.BOOL}),
    symbols=frozenset(SYMBOLS),
    options={
        **_BUILDER_OPTIONS,
        **_FIXED_SHAPES,
        "version_compatible": None,
        "hardware_compatibility_level": frozenset({"ampere_plus"}),
    },
    refusals={
        **_GATHERED_CACHE,
        "dtype bfloat16": "it came with TensorRT 9",
        "strip_plan": "plans without weights came with TensorRT 10",
        "weight_streaming": "it came with TensorRT 10.1",
    },
)
"""8.6 to 8.x: no bfloat16, int64, FP8, no constants of 4 and 8 bits, no layer of a transformer, types are wishes."""

TENSORRT_9 = replace(
    TENSORRT_8_6,
    release="TensorRT 9.x",
    compute_dtypes=(DType.FLOAT16, DType.BFLOAT16, DType.FLOAT32),
    value_dtypes=(TENSORRT_8_6.value_dtypes or frozenset()) | {DType.BFLOAT16},
    refusals={key: why for key, why in TENSORRT_8_6.refusals.items() if key != "dtype bfloat16"},
)
"""9.x: bfloat16."""

TENSORRT_10 = replace(
    TENSORRT_9,
    release="TensorRT 10.0 to 10.14",
    value_dtypes=(TENSORRT_9.value_dtypes or frozenset()) | {DType.INT8},
    options={**TENSORRT_9.options, "strip_plan": None, "weight_streaming": None},
    refusals=_GATHERED_CACHE,
)
"""10.0 to 10.14: strongly typed, constants of 8 bits. Integers stay int32, as the kernels index by them."""

TENSORRT_10_15 = replace(
    CAPABILITIES,
    release="TensorRT 10.15 to 11.x",
    options={
        **_BUILDER_OPTIONS,
        "strip_plan": None,
        "weight_streaming": None,
        "version_compatible": None,
        "hardware_compatibility_level": frozenset({"ampere_plus", "same_compute_capability"}),
    },
    refusals={
        "kv_cache_quant_algo": CAPABILITIES.refusals["kv_cache_quant_algo"],
        "compute_capabilities": _GATHERED_CACHE["compute_capabilities"],
    },
)
"""10.15 to 11.x: the layers of a transformer."""


@dataclass(frozen=True)
class Release:
    """A range of versions with one table: from `first` on, up to the next one's."""

    flavour: str
    first: tuple[int, ...]
    capabilities: Capabilities

    @property
    def name(self) -> str:
        return self.capabilities.release


RELEASES = (
    Release(FULL_NAME, (8, 6), TENSORRT_8_6),
    Release(FULL_NAME, (9, 0), TENSORRT_9),
    Release(FULL_NAME, (10, 0), TENSORRT_10),
    Release(FULL_NAME, (10, 15), TENSORRT_10_15),
    Release(RTX_NAME, (1, 7), CAPABILITIES),
)


def release_of(version: TensorRtVersion) -> Release:
    """The release range of a version. Raises UsageError for one that is older than all."""
    found = [entry for entry in RELEASES if entry.flavour == version.flavour and version.at_least(*entry.first)]
    if not found:
        raise UsageError(
            f"{version.label} is too old for the tensorrt target",
            "it knows TensorRT 8.6 to 11.x (write 8.6, 10.13, ...) and TensorRT-RTX 1.7 (write rtx-1.7)",
        )
    return found[-1]


def capabilities_for(version: str | None) -> Capabilities:
    """The table of a version as users name it; without one that of the installed library, or of TensorRT-RTX."""
    if version is not None:
        return release_of(parse_version(version)).capabilities
    try:
        return release_of(load().release).capabilities
    except TargetError:
        return CAPABILITIES
