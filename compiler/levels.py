"""The order of passes: one list per optimization level, and the list every level ends with."""

from __future__ import annotations

from trtllm.passes.base import Pass
from trtllm.passes.canonical_shapes import CanonicalShapes
from trtllm.passes.cleanup import FoldConstants, RemoveDeadCode, ShareCommonSubexpressions
from trtllm.passes.decompose_attention import DecomposeAttention
from trtllm.passes.decompose_rotary import DecomposeRotary
from trtllm.passes.fuse_add_norm import FuseAddNorm
from trtllm.passes.gather_cache import GatherCache
from trtllm.passes.inline_dialect import InlineDialect
from trtllm.passes.keep_quantization import KeepQuantization
from trtllm.passes.lower_attention import LowerAttention
from trtllm.passes.lower_cached_attention import LowerCachedAttention
from trtllm.passes.lower_linear import LowerLinear
from trtllm.passes.lower_moe import LowerMoE
from trtllm.passes.lower_norm import LowerAddNorm
from trtllm.passes.lower_scaled import LowerScaled
from trtllm.passes.narrow_inputs import NarrowInputs
from trtllm.passes.pack import PackGateUp, PackQkv
from trtllm.passes.pack_tokens import PackTokens
from trtllm.passes.quantize import QuantizeWeights
from trtllm.passes.quantize_cache import QuantizeCache
from trtllm.passes.quantize_scaled import QuantizeScaled
from trtllm.passes.select_tokens import SelectLastToken
from trtllm.passes.share_embedding import ShareEmbedding
from trtllm.passes.smooth import SmoothActivations
from trtllm.passes.widen_weights import WidenWeights

# What the build asks for, at every level: which logits, which weights.
O0: tuple[type[Pass], ...] = (
    SelectLastToken,
    SmoothActivations,
    KeepQuantization,
    QuantizeScaled,
    QuantizeWeights,
)

# Cleaner graph, same operators.
O1: tuple[type[Pass], ...] = (
    SelectLastToken,
    SmoothActivations,
    FuseAddNorm,
    KeepQuantization,
    QuantizeScaled,
    QuantizeWeights,
    ShareCommonSubexpressions,
    RemoveDeadCode,
)

# Fewer, wider products. Packing precedes quantization, which sees the packed weights.
O2: tuple[type[Pass], ...] = (
    SelectLastToken,
    SmoothActivations,
    PackQkv,
    PackGateUp,
    FuseAddNorm,
    KeepQuantization,
    QuantizeScaled,
    QuantizeWeights,
    ShareCommonSubexpressions,
    RemoveDeadCode,
)

LEVELS: tuple[tuple[type[Pass], ...], ...] = (O0, O1, O2)

# Legalization: the target's own operators where it has them, standard ones elsewhere. Read from its table.
LEGALIZE: tuple[type[Pass], ...] = (
    PackTokens,
    GatherCache,
    NarrowInputs,
    QuantizeCache,
    WidenWeights,
    LowerCachedAttention,
    LowerAttention,
    LowerAddNorm,
    LowerMoE,
    LowerScaled,
    LowerLinear,
    ShareEmbedding,
    InlineDialect,
    DecomposeAttention,
    DecomposeRotary,
    RemoveDeadCode,
    CanonicalShapes,
    ShareCommonSubexpressions,
    FoldConstants,
    ShareCommonSubexpressions,
    RemoveDeadCode,
)


def pipeline(level: int) -> tuple[type[Pass], ...]:
    """The passes of an optimization level, legalization included."""
    return LEVELS[level] + LEGALIZE


def pass_names() -> tuple[str, ...]:
    """Every pass's name, in order of first appearance at the highest level."""
    return tuple(dict.fromkeys(cls.name for cls in (*O2, *O1, *O0, *LEGALIZE)))
