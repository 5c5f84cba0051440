"""Tiny random models of every family, made once a session, as objects and as saved directories."""

from pathlib import Path

import pytest

_DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {
    "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2
}  # fmt: skip
_BERT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_GEMMA = _DECODER | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
_VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER | {"tie_word_embeddings": True}),
    "llama_untied": ("LlamaForCausalLM", "LlamaConfig", _DECODER | {"attention_bias": True}),
    "llama_base": ("LlamaModel", "LlamaConfig", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER | {"head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _DECODER
        | {
            "head_dim": 16,
            "num_experts": 3,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _DECODER | {"num_local_experts": 3}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt2_base": ("GPT2Model", "GPT2Config", _GPT2),
    "bert": ("BertModel", "BertConfig", _BERT),
    "bert_masked": ("BertForMaskedLM", "BertConfig", _BERT),
}


def _make(family):
    import torch
    import transformers

    torch.manual_seed(0)
    if family == "gemma3_wrapped":
        config = transformers.Gemma3Config(text_config=_GEMMA, vision_config=_VISION, mm_tokens_per_image=4)
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        class_name, config_name, values = _FAMILIES[family]
        model = getattr(transformers, class_name)(getattr(transformers, config_name)(**values))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, which are born as ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def tiny_model():
    """`tiny_model("llama")`: the transformers model of that family; the same object at every call."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = _make(family)
        return made[family]

    return of


@pytest.fixture(scope="session")
def tiny_directory(tiny_model, tmp_path_factory):
    """`tiny_directory("llama")`: where that model was saved. It is shared: copy it to change it."""
    made: dict[str, Path] = {}

    def of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_model(family).save_pretrained(made[family])
        return made[family]

    return of
