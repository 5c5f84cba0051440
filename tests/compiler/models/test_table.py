"""The table of architectures: each entry loads; an unknown one is refused with the nearest and the differences."""

from __future__ import annotations

from typing import Any

import pytest

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.compiler.models.table import ARCHITECTURES, builder_for
from trtllm.compiler.pipeline import compile_network, read_model
from trtllm.config import build_config
from trtllm.errors import UnsupportedModelError
from trtllm.progress import Silent

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def refusal(architecture: str, config: str, **options: Any) -> UnsupportedModelError:
    import transformers

    model = getattr(transformers, architecture)(getattr(transformers, config)(**{**SIZES, **options}))
    with pytest.raises(UnsupportedModelError) as caught:
        compile_network(read_model(model, progress=Silent()), build_config({}))
    assert str(caught.value).count("\n") == 1, "an error is two lines"
    assert caught.value.hint.startswith("supported: LlamaForCausalLM, ")
    return caught.value


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_entry_names_a_builder(architecture: str) -> None:
    assert callable(builder_for(Checkpoint("test", "the test", architecture, {}, {})))


def test_other_tensors_and_keys_are_listed() -> None:
    assert refusal("OlmoForCausalLM", "OlmoConfig", clip_qkv=3.0).what == (
        "OlmoForCausalLM: architecture 'OlmoForCausalLM' is not supported; nearest is LlamaForCausalLM, which has "
        "other tensors: lacks model.layers.N.input_layernorm.weight, model.layers.N.post_attention_layernorm.weight, "
        "model.norm.weight; other config keys: clip_qkv"
    )


def test_the_nearest_is_the_one_with_the_fewest_other_tensors() -> None:
    what = refusal("Olmo2ForCausalLM", "Olmo2Config").what
    assert "nearest is Qwen3ForCausalLM, which has other tensors: unexpected model.layers.N.post_feedforward" in what
    assert "lacks model.layers.N.input_layernorm.weight" in what


def test_with_equal_tensors_the_config_keys_tell_the_difference() -> None:
    what = refusal("GraniteForCausalLM", "GraniteConfig").what
    assert "nearest is LlamaForCausalLM, which has the same tensors: other config keys: attention_multiplier" in what
    assert what.endswith("and 1 more")


def test_a_model_of_another_kind_has_no_nearest() -> None:
    what = refusal("MambaForCausalLM", "MambaConfig", state_size=4).what
    assert what == "MambaForCausalLM: architecture 'MambaForCausalLM' is not supported"
