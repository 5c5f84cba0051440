"""Writes tiny models as GGUF files by the rules of llama.cpp's convert_hf_to_gguf.py, names from gguf's own mapping."""

import re

import gguf
import numpy as np
import pytest

_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "llama_untied": gguf.MODEL_ARCH.LLAMA, "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3, "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "gemma2": gguf.MODEL_ARCH.GEMMA2, "gemma3": gguf.MODEL_ARCH.GEMMA3, "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt2": gguf.MODEL_ARCH.GPT2, "bert": gguf.MODEL_ARCH.BERT,
}  # fmt: skip
_EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")
_STACKED = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "down_proj": "down", "up_proj": "up"}
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def _permuted(weights, heads):
    """LlamaModel.permute of the converter."""
    return weights.reshape(heads, 2, -1, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def _stored(family, name, array, config):
    if family in ("llama", "llama_untied", "mixtral") and ".q_proj." in name:
        return _permuted(array, config.num_attention_heads)
    if family in ("llama", "llama_untied", "mixtral") and ".k_proj." in name:
        return _permuted(array, config.num_key_value_heads)
    if family.startswith("gemma") and name.endswith("norm.weight"):
        return array + np.float32(1)
    if family == "gpt2" and name.endswith(_TRANSPOSED):
        return np.ascontiguousarray(array.T)
    return array


def _gguf_tensors(family, checkpoint, config):
    """Name and array of every tensor, experts stacked."""
    layers = getattr(config, "num_hidden_layers", None) or config.n_layer
    mapping = gguf.get_tensor_name_map(_ARCHITECTURES[family], layers)
    stacks = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("pooler."):
            continue
        expert = _EXPERT.fullmatch(name)
        if expert:
            layer, _, matrix = expert.groups()
            stacks.setdefault(f"blk.{layer}.ffn_{_STACKED[matrix]}_exps.weight", []).append(tensor.read())
            continue
        gguf_name = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name, name
        yield gguf_name, _stored(family, name, tensor.read(), config)
    for name, matrices in stacks.items():
        yield name, np.stack(matrices)


def _write_metadata(writer, family, config):
    is_gpt2 = family == "gpt2"
    heads = config.n_head if is_gpt2 else config.num_attention_heads
    hidden = config.n_embd if is_gpt2 else config.hidden_size
    writer.add_block_count(config.n_layer if is_gpt2 else config.num_hidden_layers)
    writer.add_context_length(config.n_positions if is_gpt2 else config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(4 * hidden if is_gpt2 else config.intermediate_size)
    writer.add_head_count(heads)
    if family in ("gpt2", "bert"):
        writer.add_layer_norm_eps(config.layer_norm_epsilon if is_gpt2 else config.layer_norm_eps)
        return
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if family in ("llama", "llama_untied", "mixtral", "phi3"):
        writer.add_rope_dimension_count(head_dim)
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family in ("mixtral", "qwen3_moe"):
        writer.add_expert_count(config.num_local_experts if family == "mixtral" else config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if family == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if family.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


@pytest.fixture(scope="session")
def write_gguf(tiny_model, tiny_directory):
    """`write_gguf(path, "llama", kind=Q8_0, change=...)`: a tiny model as a GGUF file.

    `kind` is what matrices of a multiple of 32 columns are stored as. `change` gets the writer before it writes, and
    `tensors` may replace the (name, array) pairs.
    """
    from trtllm.frontends.detect import open_model

    def write(path, family, *, kind=None, change=None, tensors=None):
        config = tiny_model(family).config
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_ARCHITECTURES[family]])
        _write_metadata(writer, family, config)
        pairs = list(_gguf_tensors(family, open_model(tiny_directory(family)), config))
        for name, array in tensors(pairs) if tensors else pairs:
            if kind is not None and array.ndim > 1 and array.shape[-1] % 32 == 0:
                writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, array)
        if change:
            change(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
