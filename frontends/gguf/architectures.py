"""What each GGUF architecture is in Hugging Face terms: tensor names, and how the stored layout differs.

Names are those of gguf-py's `constants.py` and `tensor_mapping.py`, differences those of `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field


class Layout(enum.Enum):
    """How the stored tensor becomes that of the Hugging Face model."""

    AS_STORED = "as stored"
    QUERY_ROTARY = "query rows of each head are interleaved pairs"
    KEY_ROTARY = "key rows of each head are interleaved pairs"
    MINUS_ONE = "stored plus one"
    TRANSPOSED = "stored transposed"
    EXPERTS = "one matrix an expert"


@dataclass(frozen=True)
class GgufArchitecture:
    """Tensor names without `.weight` and `.bias`; `layer` names stand below `layer_prefix`."""

    hf_class: str
    model_type: str
    top: Mapping[str, str]
    layer: Mapping[str, str]
    layer_prefix: str = "model.layers"
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    """Of `.weight` (and of `.bias`, for rotary rows); names that are missing are as stored."""
    norms_plus_one: bool = False
    ignored: tuple[str, ...] = ("rope_freqs", "attn_rot_embd")


_DECODER_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_DENSE = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_EXPERTS = dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), Layout.EXPERTS)
_INTERLEAVED = {"attn_q": Layout.QUERY_ROTARY, "attn_k": Layout.KEY_ROTARY}
_GEMMA = _ATTENTION | _DENSE | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip

_MIXTRAL = GgufArchitecture(
    "MixtralForCausalLM", "mixtral", _DECODER_TOP,
    _ATTENTION | {
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1", "ffn_gate": "block_sparse_moe.experts.{expert}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3", "ffn_up": "block_sparse_moe.experts.{expert}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2", "ffn_down": "block_sparse_moe.experts.{expert}.w2",
    },
    layouts=_INTERLEAVED | _EXPERTS,
)  # fmt: skip

_ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "llama": GgufArchitecture(
        "LlamaForCausalLM", "llama", _DECODER_TOP, _ATTENTION | _DENSE, layouts=_INTERLEAVED
    ),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", "qwen2", _DECODER_TOP, _ATTENTION | _DENSE),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", "qwen3", _DECODER_TOP, _ATTENTION | _HEAD_NORMS | _DENSE),
    "qwen3moe": GgufArchitecture(
        "Qwen3MoeForCausalLM", "qwen3_moe", _DECODER_TOP,
        _ATTENTION | _HEAD_NORMS | {
            "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
            "ffn_up_exps": "mlp.experts.{expert}.up_proj", "ffn_down_exps": "mlp.experts.{expert}.down_proj",
        },
        layouts=_EXPERTS,
    ),
    "gemma2": GgufArchitecture("Gemma2ForCausalLM", "gemma2", _DECODER_TOP, _GEMMA, norms_plus_one=True),
    "gemma3": GgufArchitecture(
        "Gemma3ForCausalLM", "gemma3_text", _DECODER_TOP, _GEMMA | _HEAD_NORMS, norms_plus_one=True
    ),
    "phi3": GgufArchitecture(
        "Phi3ForCausalLM", "phi3", _DECODER_TOP,
        {
            "attn_norm": "input_layernorm", "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj",
        },
        ignored=("rope_factors_long", "rope_factors_short"),
    ),
    "gpt2": GgufArchitecture(
        "GPT2LMHeadModel", "gpt2",
        {
            "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        {
            "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
        },
        layer_prefix="transformer.h",
        layouts=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), Layout.TRANSPOSED),
    ),
    "bert": GgufArchitecture(
        "BertModel", "bert",
        {
            "token_embd": "embeddings.word_embeddings", "token_types": "embeddings.token_type_embeddings",
            "position_embd": "embeddings.position_embeddings", "token_embd_norm": "embeddings.LayerNorm",
        },
        {
            "attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value",
            "attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm",
            "ffn_up": "intermediate.dense", "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
        },
        layer_prefix="encoder.layer",
    ),
}  # fmt: skip


def supported_architectures() -> tuple[str, ...]:
    return tuple(_ARCHITECTURES)


def find_architecture(name: str, *, has_experts: bool) -> GgufArchitecture | None:
    """The entry for `general.architecture`; `llama` with experts is Mixtral. None when it is not read."""
    if name == "llama" and has_experts:
        return _MIXTRAL
    return _ARCHITECTURES.get(name)
