"""A transformers object is read as the directory it would be saved to."""

import numpy as np
import pytest
import torch

from trtllm.dtypes import DType
from trtllm.errors import UsageError
from trtllm.frontends.detect import open_model

FAMILIES = [
    "llama", "llama_untied", "llama_base", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3", "phi3", "gpt2",
    "gpt2_base", "bert", "bert_masked", "gemma3_wrapped",
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_an_object_is_what_its_saved_directory_is(tiny_model, tiny_directory, family):
    held, saved = open_model(tiny_model(family)), open_model(tiny_directory(family))
    assert held.format == "transformers"
    assert held.architecture == saved.architecture
    assert held.tensors.keys() == saved.tensors.keys()
    for name, tensor in saved.tensors.items():
        assert held.tensors[name].spec == tensor.spec
        np.testing.assert_array_equal(held.tensors[name].read(), tensor.read(), err_msg=name)
        np.testing.assert_array_equal(held.tensors[name].read(1, 3), tensor.read(1, 3), err_msg=name)
    assert {key: held.config.get(key) for key in saved.config} == dict(saved.config)


def test_a_read_does_not_alias_the_model(tiny_model):
    model = tiny_model("llama")
    array = open_model(model).tensors["model.norm.weight"].read()
    array[:] = 99
    assert not (model.model.norm.weight == 99).any()


def test_a_bfloat16_model_keeps_its_type(tiny_model):
    import copy

    model = copy.deepcopy(tiny_model("llama")).to(torch.bfloat16)
    tensor = open_model(model).tensors["model.norm.weight"]
    assert tensor.spec.dtype is DType.BFLOAT16
    np.testing.assert_array_equal(tensor.read().astype(np.float32), model.model.norm.weight.detach().float().numpy())


def test_the_tokenizer_travels_along(tiny_model):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    checkpoint = open_model(tiny_model("llama"), tokenizer=tokenizer)
    assert Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode()).encode("b").ids == [1]
    assert {"tokenizer_config.json", "generation_config.json"} <= checkpoint.assets.keys()
    assert all(isinstance(content, bytes) for content in checkpoint.assets.values())


@pytest.mark.parametrize("thing", [3, None, object(), {"a": 1}, torch.nn.Linear(2, 2), torch.zeros(2)])
def test_an_object_that_is_no_model_is_refused(thing):
    with pytest.raises(UsageError, match=type(thing).__name__):
        open_model(thing)


def test_a_tokenizer_beside_a_path_is_refused(tiny_directory):
    with pytest.raises(UsageError, match="tokenizer="):
        open_model(tiny_directory("llama"), tokenizer=object())
