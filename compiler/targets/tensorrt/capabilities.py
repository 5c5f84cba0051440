"""What the plans of TensorRT-RTX 1.7 run, as a capability table."""

from __future__ import annotations

from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.compiler.targets.tensorrt.operators.table import OPERATORS
from trtllm.compiler.targets.tensorrt.profiles import SYMBOLS
from trtllm.dtypes import DType

SCHEME_CAPABILITIES = {
    "FP8": 89,
    "NVFP4": 120,
    "W4A16_MXFP4": 120,
    "W8A8_SQ_PER_CHANNEL": 75,
    "W8A8_SQ_PER_TENSOR_PLUGIN": 75,
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN": 75,
}
"""The first GPUs that multiply in a scheme's format. Scales of single tokens and of 128 x 128 blocks have no layer."""

CAPABILITIES = Capabilities(
    target="tensorrt",
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
        "profiling_verbosity": None,
        "builder_optimization_level": None,
        "compute_capabilities": frozenset({"75", "80", "86", "89", "120", "121"}),
    },
    refusals={
        "kv_cache_quant_algo": "its layer that extends the cache in place has no quantized form that attention reads",
        "strip_plan": "without a GPU TensorRT-RTX 1.7 fails to build plans without weights",
        "compute_capabilities 90": "TensorRT-RTX does not run on H100 and H200",
        "compute_capabilities 9.0": "TensorRT-RTX does not run on H100 and H200; write 8.6 as 86",
    },
)  # fmt: skip
