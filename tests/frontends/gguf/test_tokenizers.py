"""Tokenizers rebuilt from GGUF metadata against the ones their vocabularies were taken from."""

import json

import pytest
import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from trtllm.errors import BadInputError
from trtllm.frontends.detect import open_model

TEXTS = [
    "the quick brown fox", " leading", "trailing  ", "two  spaces", "", " ", "a\n\nb\t\tc", "12345 6.7e-8",
    "don't WE'LL", "ünïcödé ñ", "日本語 text", "😀 emoji 👩‍👩‍👧", "def f(x):\n    return x**2\n",
    "<s>user</s>hi<think>", "x" * 50, "\r\n \r\n",
]  # fmt: skip
CORPUS = [text for text in TEXTS for _ in range(5)] + ["the fox and the hound ran over the brown hill 1 2 3"] * 20
CONTROL, USER, NORMAL, UNKNOWN, BYTE = 3, 4, 1, 2, 6
SPECIAL = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<think>": USER}


@pytest.fixture
def rebuilt(write_gguf, tmp_path):
    """The tokenizer of a file with these metadata, and the checkpoint."""

    def build(family="llama", **values):
        def change(writer):
            for key, value in values.items():
                name = f"tokenizer.ggml.{key}" if key != "chat_template" else "tokenizer.chat_template"
                if isinstance(value, list):
                    writer.add_array(name, value)
                elif isinstance(value, bool):
                    writer.add_bool(name, value)
                elif isinstance(value, int):
                    writer.add_uint32(name, value)
                else:
                    writer.add_string(name, value)

        checkpoint = open_model(write_gguf(tmp_path / "m.gguf", family, change=change))
        data = checkpoint.assets.get("tokenizer.json")
        return checkpoint, data and Tokenizer.from_str(data.decode())

    return build


def _parts(tokenizer):
    """Tokens, kinds and merges of a trained tokenizer as the converter writes them."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    kinds = [BYTE if len(t) == 6 and t.startswith("<0x") else SPECIAL.get(t, NORMAL) for t in tokens]
    return tokens, kinds, [" ".join(merge) for merge in model.get("merges", [])]


def _with_special(tokenizer):
    """The same tokenizer: the trainer made all its reserved tokens special, here only those that are."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(state))
    special = [tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return tokenizer


def _byte_level(pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_special(tokenizer)


def _split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    "qwen2": _split(QWEN2),
    "dbrx": _split(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")),
}


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_byte_level_tokenizers_come_back(rebuilt, pre):
    original = _byte_level(BYTE_LEVEL[pre])
    tokens, kinds, merges = _parts(original)
    _, tokenizer = rebuilt(model="gpt2", pre=pre, tokens=tokens, token_type=kinds, merges=merges)
    for text in TEXTS:
        expected = original.encode(text).ids
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected) == original.decode(expected), text


def _sentencepiece(*, prefix):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*SPECIAL, *bytes_], limit_alphabet=60)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _with_special(tokenizer)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers_come_back(rebuilt, prefix):
    original = _sentencepiece(prefix=prefix)
    tokens, kinds, merges = _parts(original)
    scores = [-float(index) for index in range(len(tokens))]
    _, tokenizer = rebuilt(
        model="llama", tokens=tokens, token_type=kinds, scores=scores, merges=merges, add_space_prefix=prefix,
        add_bos_token=False,
    )  # fmt: skip
    for text in TEXTS:
        expected = original.encode(text).ids
        assert tokenizer.encode(text).ids == expected, text
        assert tokenizer.decode(expected) == original.decode(expected), text


def test_merges_that_a_file_lacks_are_those_of_transformers(rebuilt):
    from transformers.tokenization_utils_base import generate_merges

    tokens, kinds, _ = _parts(_sentencepiece(prefix=True))
    scores = [-float(index) for index in range(len(tokens))]
    checkpoint, _ = rebuilt(model="llama", tokens=tokens, token_type=kinds, scores=scores)
    vocab = {token: index for index, token in enumerate(tokens)}
    expected = generate_merges(vocab, dict(zip(tokens, scores, strict=True)))
    found = json.loads(checkpoint.assets["tokenizer.json"])["model"]["merges"]
    assert [tuple(merge) for merge in found] == expected


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_gemma_tokens_of_spaces_get_their_spelling_back(rebuilt, family):
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", "a", "  ", "   ", "▁a"]
    kinds = [CONTROL, CONTROL, CONTROL, UNKNOWN, NORMAL, NORMAL, NORMAL, NORMAL, NORMAL]
    _, tokenizer = rebuilt(
        family, model="llama", tokens=tokens, token_type=kinds, scores=[0.0] * 9, add_space_prefix=False,
        bos_token_id=2, unknown_token_id=3,
    )  # fmt: skip
    assert tokenizer.encode("a  a", add_special_tokens=False).ids in ([5, 6, 5], [5, 4, 8])
    assert tokenizer.encode("  ").ids == [2, 6]
    assert tokenizer.decode([5, 6, 5]) == "a  a"


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld", "!", "##s", "un", "##able"]


def _phantom(token):
    """The converter's spelling."""
    if token.startswith("["):
        return token
    return token[2:] if token.startswith("##") else "▁" + token


def test_wordpiece_tokenizers_come_back(rebuilt):
    from transformers import BertTokenizerFast

    original = BertTokenizerFast(vocab={word: index for index, word in enumerate(WORDS)}, do_lower_case=True)
    kinds = [CONTROL if word.startswith("[") else NORMAL for word in WORDS]
    checkpoint, tokenizer = rebuilt(
        "bert", model="bert", tokens=[_phantom(word) for word in WORDS], token_type=kinds, unknown_token_id=1,
        seperator_token_id=3, padding_token_id=0, cls_token_id=2, mask_token_id=4,
    )  # fmt: skip
    for text in ["hello world!", "HELLO worlds", "unable unworld", "héllo", "[MASK] hello", "日本", ""]:
        assert tokenizer.encode(text).ids == original(text)["input_ids"], text
    pair = original("hello", "world")
    assert tokenizer.encode("hello", "world").ids == pair["input_ids"]
    assert tokenizer.encode("hello", "world").type_ids == pair["token_type_ids"]
    config = json.loads(checkpoint.assets["tokenizer_config.json"])
    assert (config["cls_token"], config["sep_token"], config["pad_token"]) == ("[CLS]", "[SEP]", "[PAD]")


MINIMAL = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab", "<s>", "</s>"], "merges": ["a b"]}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, [2]),
        ({"pre": "llama-bpe"}, [3, 2]),
        ({"pre": "llama-bpe", "add_bos_token": False}, [2]),
        ({"add_bos_token": True}, [3, 2]),
        ({"add_eos_token": True}, [2, 4]),
        ({"add_bos_token": True, "add_eos_token": True}, [3, 2, 4]),
    ],
)
def test_texts_begin_and_end_as_the_flags_say(rebuilt, flags, expected):
    values = MINIMAL | {"token_type": [1, 1, 1, 3, 3], "bos_token_id": 3, "eos_token_id": 4} | flags
    _, tokenizer = rebuilt(**values)
    assert tokenizer.encode("ab").ids == expected
    assert tokenizer.encode("ab", add_special_tokens=False).ids == [2]


def test_every_end_of_turn_ends_a_generation(rebuilt):
    checkpoint, _ = rebuilt(**MINIMAL, eos_token_id=4, eot_token_id=3, bos_token_id=3)
    generation = json.loads(checkpoint.assets["generation_config.json"])
    assert generation == {"bos_token_id": 3, "eos_token_id": [4, 3]}


def test_the_chat_template_travels_along(rebuilt):
    checkpoint, _ = rebuilt(**MINIMAL, chat_template="{{ messages }}")
    assert checkpoint.assets["chat_template.jinja"] == b"{{ messages }}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "rwkv"}, "rwkv"),
        ({"pre": "some-new-rule"}, "some-new-rule"),
        ({"merges": ["a z"]}, "could not be rebuilt"),
    ],
)
def test_a_tokenizer_that_cannot_be_rebuilt_is_left_out_and_noted(rebuilt, change, words):
    checkpoint, tokenizer = rebuilt(**(MINIMAL | change))
    assert tokenizer is None
    assert any(words in note and "token ids only" in note for note in checkpoint.notes)


def test_a_file_without_tokenizer_is_noted(rebuilt):
    checkpoint, tokenizer = rebuilt()
    assert tokenizer is None
    assert any("no tokenizer" in note for note in checkpoint.notes)


def test_a_guessed_word_rule_is_noted(rebuilt):
    checkpoint, _ = rebuilt(**{key: value for key, value in MINIMAL.items() if key != "pre"})
    assert any("tokenizer.ggml.pre" in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_type": [1]}, "token_type"),
        ({"scores": [0.5]}, "scores"),
        ({"eos_token_id": 5}, "eos_token_id"),
        ({"merges": ["ab"]}, "merge"),
        ({"merges": ["a "]}, "merge"),
        ({"tokens": [1, 2]}, "tokens"),
        ({"bos_token_id": "x"}, "bos_token_id"),
    ],
)
def test_contradicting_metadata_are_refused(rebuilt, change, words):
    with pytest.raises(BadInputError, match=words):
        rebuilt(**(MINIMAL | change))
