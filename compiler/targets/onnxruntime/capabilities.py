"""What onnxruntime's CPU provider runs (measured on 1.32), as a capability table."""

from __future__ import annotations

from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.dtypes import DType
from trtllm.quantization import SCHEMES, ScaledFormat

CAPABILITIES = Capabilities(
    target="onnxruntime",
    operators=frozenset(
        {
            "::Attention",
            "::RMSNormalization",
            "::RotaryEmbedding",
            "::TensorScatter",
            "com.microsoft::GroupQueryAttention",
            "com.microsoft::MatMulNBits",
            "trtllm.cpu::CachedAttention",
            "trtllm.cpu::PagedAttention",
            "trtllm.cpu::PagedAttentionInt8",
            "trtllm.cpu::PagedAttentionFloat8",
            "trtllm.cpu::QuantizedEmbedding",
            "trtllm.cpu::QuantizedLinear",
            "trtllm.cpu::ScaledLinear",
            "com.microsoft::MoE",
            "com.microsoft::QMoE",
            "com.microsoft::SkipSimplifiedLayerNormalization",
            "com.microsoft::SkipLayerNormalization",
        }
    ),
    compute_dtypes=(DType.FLOAT32, DType.FLOAT16),
    schemes=frozenset(
        {"W8A16", "W4A16", "W4A16_AWQ", "W4A16_GPTQ", "W8A16_GPTQ", "MIXED_PRECISION"}
        | {name for name, scheme in SCHEMES.items() if isinstance(scheme, ScaledFormat)}
    ),
    dtype_fallbacks={DType.BFLOAT16: DType.FLOAT32},
    external_weights=True,
    static_cache=False,
    packed_int4=True,
    options={"kv_cache_quant_algo": frozenset({"INT8", "FP8"}), "activation_bits": frozenset({"16"})},
)
