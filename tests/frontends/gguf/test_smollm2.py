"""A published file, SmolLM2-135M-Instruct in Q4_1, against what transformers makes of it."""

import json
import random

import numpy as np
import pytest

from trtllm.frontends.detect import open_model

pytestmark = pytest.mark.slow

TEXTS = [
    "Hello world", " leading", "trailing  ", "a\n\n b\t\tc", "def f(x):\n    return x * y + z\n",
    "日本語のテキスト", "Ünïcödé ñ",
    "😀😃👨‍👩‍👧‍👦 family", "<|im_start|>user\nhi<|im_end|>\n", "   ", "", "\r\n\r\n", "don't can't we'll I'M",
    "\u00a0nbsp\u200bzwsp",
    "العربية עברית", "x" * 300, "http://a.b/c?d=e&f=g#h", "\x01", "I ❤️ to eat 🍕s", "<repo_name>foo<file_sep>",
]  # fmt: skip
ALPHABET = [*"abcXYZ .,!?'\"\n\t()[]{}<>|_-#$%éß中文ا", "🙂", "\u0301", "  ", "ก", "the", " of", "ing"]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a <b> & 'c'"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3\n"}],
]
# Digits stand alone in this model's tokenizer, which its GGUF file says by `smollm` and transformers 5.23 overlooks.
# The ids are llama.cpp's (llama_cpp_python 0.3.36).
WITH_DIGITS = {
    "1234567890 12.5e-3": "33 34 35 36 37 38 39 40 41 32 216 33 34 30 37 85 29 35",
    "   1": "333 33",
    "a\n\n42": "81 1116 36 34",
}


@pytest.fixture(scope="module")
def checkpoint(smollm2_gguf):
    return open_model(smollm2_gguf)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())


@pytest.fixture(scope="module")
def reference_tokenizer(smollm2_gguf):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


def _texts():
    generator = random.Random(0)
    drawn = ["".join(generator.choices(ALPHABET, k=generator.randint(1, 60))) for _ in range(200)]
    return TEXTS + drawn


def test_the_notes_say_what_is_quantized(checkpoint):
    assert checkpoint.notes == (
        "GGUF file, LlamaForCausalLM, 272 tensors",
        "quantized: 210 tensors Q4_1, 1 Q8_0",
    )


def test_all_tensors_are_those_of_transformers_bit_for_bit(checkpoint, smollm2_gguf):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), tensor.numpy(), err_msg=name)
    config = model.config.to_dict()
    for key, value in checkpoint.config.items():
        if key in ("architectures", "torch_dtype", "rope_theta", "rope_scaling"):
            continue
        assert config[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": checkpoint.config["rope_theta"]}


def test_token_ids_and_texts_are_those_of_transformers(tokenizer, reference_tokenizer):
    for text in _texts():
        ids = reference_tokenizer(text)["input_ids"]
        assert tokenizer.encode(text).ids == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == reference_tokenizer.decode(ids)


@pytest.mark.parametrize("text", WITH_DIGITS)
def test_digits_are_tokens_of_their_own(tokenizer, text):
    assert tokenizer.encode(text).ids == [int(token) for token in WITH_DIGITS[text].split()]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_are_rendered_as_by_transformers(checkpoint, reference_tokenizer, tmp_path, chat, prompt):
    from trtllm.runtime.tokenizer import Tokenizer

    for name, content in checkpoint.assets.items():
        (tmp_path / name).write_bytes(content)
    expected = reference_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(chat, add_generation_prompt=prompt) == expected


def test_special_tokens_are_named(checkpoint):
    config = json.loads(checkpoint.assets["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert json.loads(checkpoint.assets["generation_config.json"])["eos_token_id"] == 2
