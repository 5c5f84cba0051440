"""The runtime's tokenizer gives what transformers' fast tokenizer gives, and refuses what it cannot do in two lines."""

import json
import random
import shutil
import subprocess
import sys

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from trtllm.errors import BadInputError, TrtllmError, UsageError
from trtllm.runtime.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What templates of published models use: indented blocks, namespaces, loop controls, macros, tojson, tools, dates.
ELABORATE = """{{- bos_token }}
{%- macro shout(text) %}{{ text | upper }}!{% endmacro %}
{%- set ns = namespace(count=0, last=none) %}
{%- if tools %}
    {{- "Tools:\\n" }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{% for message in messages %}
    {% if message.role == "skip" %}
        {% continue %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}
    [{{ message.role }}] {{ message.content | trim }}
    {% endgeneration %}
    {% if message.reasoning_content is defined %}
    ({{ message.reasoning_content }})
    {% endif %}
{% endfor %}
{{ shout("end") }} {{ ns.count }} {{ {"ü": [1, none, true]} | tojson }} {{ enable_thinking | default("unset") }}
{%- if add_generation_prompt %}>>{{ eos_token }}{% endif %}"""
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " <b>&amp; "}, {"role": "user", "content": "x\n"}, {"role": "skip", "content": "y"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "reasoning": "why", "tool_calls": None}],
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"é": {}}}}}]


@pytest.fixture
def directory(tmp_path):
    """A byte-level tokenizer with the usual special tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["the fox and the hound"] * 10, trainer)
    backend.add_special_tokens(["<s>", "<|im_end|>", "<|im_start|>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    _write(tmp_path, "tokenizer_config.json", bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>")
    return tmp_path


def _write(directory, name, **values):
    (directory / name).write_text(json.dumps(values))


def _reference(directory):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def _texts(seed=0, count=200):
    fixed = [
        "",
        " ",
        "the fox",
        " the  hound ",
        "don't stop .",
        "日本語 ünï",
        "😀👩‍👩‍👧",
        "a\r\n\tb",
        "<|im_start|>the<|im_end|>",
        "1.5 , x !",
    ]
    generator = random.Random(seed)
    alphabet = [*"abc XYZ.,!?'\n\t<>|", "é", "中", "🙂", "the ", "1", "\u0301", " n't", " 's"]
    return fixed + ["".join(generator.choices(alphabet, k=generator.randint(1, 40))) for _ in range(count)]


def _check_parity(tokenizer, reference):
    for text in _texts():
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == reference(text, add_special_tokens=special)["input_ids"], text
            for skip in (True, False):
                expected = reference.decode(ids, skip_special_tokens=skip)
                assert tokenizer.decode(ids, skip_special_tokens=skip) == expected, text


def test_ids_and_texts_are_those_of_transformers(directory):
    _check_parity(Tokenizer.from_directory(directory), _reference(directory))


def test_truncation_and_padding_of_the_file_are_off(directory):
    backend = Backend.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    backend.save(str(directory / "tokenizer.json"))
    text = "the fox and the hound " * 4
    ids = Tokenizer.from_directory(directory).encode(text)
    assert len(ids) > 10
    assert ids == _reference(directory)(text)["input_ids"]


@pytest.mark.parametrize("flag", [True, False])
def test_clean_up_is_for_wordpieces_alone(tmp_path, directory, flag):
    _write(directory, "tokenizer_config.json", bos_token="<s>", clean_up_tokenization_spaces=flag)
    _check_parity(Tokenizer.from_directory(directory), _reference(directory))
    wordpiece = tmp_path / "wordpiece"
    wordpiece.mkdir()
    words = ["[UNK]", "the", "fox", ".", "!", "'", "s", "n", "t", ",", "##s"]
    backend = Backend(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.save(str(wordpiece / "tokenizer.json"))
    _write(wordpiece, "tokenizer_config.json", unk_token="[UNK]", clean_up_tokenization_spaces=flag)
    tokenizer = Tokenizer.from_directory(wordpiece)
    _check_parity(tokenizer, _reference(wordpiece))
    assert tokenizer.decode([1, 2, 3]) == ("the fox." if flag else "the fox .")


def test_special_ids_and_sizes(directory):
    tokenizer, reference = Tokenizer.from_directory(directory), _reference(directory)
    assert tokenizer.bos_token_id == reference.bos_token_id
    assert tokenizer.pad_token_id == reference.pad_token_id
    assert tokenizer.eos_token_ids == (reference.eos_token_id,)
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.special_tokens == reference.special_tokens_map


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 1}, (7, 9)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({}, {"eos_token_id": 5}, None),
        ({"eos_token_id": None}, {"eos_token_id": [5, 6]}, None),
    ],
)
def test_the_generation_config_says_first_what_ends_a_text(directory, generation, model, expected):
    _write(directory, "generation_config.json", **generation)
    _write(directory, "config.json", pretrained_config=model)
    tokenizer = Tokenizer.from_directory(directory)
    own = tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.eos_token_ids == (expected or (own,))
    _write(directory, "tokenizer_config.json")
    ends = model.get("eos_token_id")
    fallback = tuple(ends) if isinstance(ends, list) else (ends,)
    assert Tokenizer.from_directory(directory).eos_token_ids == (expected or fallback)


def test_special_tokens_may_be_objects_or_lie_in_the_old_file(directory):
    _write(directory, "tokenizer_config.json", eos_token={"content": "<|im_end|>", "lstrip": False})
    _write(directory, "special_tokens_map.json", bos_token="<s>", eos_token="<pad>")
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}


# Chat templates


@pytest.mark.parametrize("template", [CHATML, ELABORATE])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_chats_are_rendered_as_by_transformers(directory, template, chat, tools, prompt):
    (directory / "chat_template.jinja").write_text(template)
    tokenizer, reference = Tokenizer.from_directory(directory), _reference(directory)
    for extra in ({}, {"enable_thinking": False}):
        expected = reference.apply_chat_template(
            chat, tools=tools, tokenize=False, add_generation_prompt=prompt, **extra
        )
        assert tokenizer.apply_chat_template(chat, tools, prompt, **extra) == expected


def test_the_date_is_known_to_a_template(directory):
    (directory / "chat_template.jinja").write_text("{{ strftime_now('%Y') }}")
    assert Tokenizer.from_directory(directory).apply_chat_template(CHATS[0]).startswith("20")


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_a_template_may_lie_in_any_of_three_files(directory, place):
    if place.endswith(".jinja"):
        (directory / place).write_text("A")
    else:
        _write(directory, place, chat_template="A")
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(CHATS[0]) == "A"


def test_named_templates_are_chosen_by_tools(directory):
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    _write(directory, "tokenizer_config.json", chat_template=named)
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.apply_chat_template(CHATS[0]) == "D"
    assert tokenizer.apply_chat_template(CHATS[0], tools=TOOLS) == "T"
    _write(directory, "tokenizer_config.json", chat_template=named[1:])
    with pytest.raises(UsageError, match="tool_use"):
        Tokenizer.from_directory(directory).apply_chat_template(CHATS[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__init__=1) }}",
        "{{ raise_exception.__globals__.os }}",
    ],
)
def test_a_template_cannot_reach_out_of_its_sandbox(directory, template):
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(UsageError, match="refuses"):
        Tokenizer.from_directory(directory).apply_chat_template(CHATS[0])


def _refused(call, *words, error=UsageError):
    with pytest.raises(error) as caught:
        call()
    assert isinstance(caught.value, TrtllmError)
    for word in words:
        assert word in caught.value.what, caught.value.what
    assert caught.value.hint
    assert "\n" not in caught.value.what + caught.value.hint


def test_without_a_chat_template_the_error_says_so(directory):
    tokenizer = Tokenizer.from_directory(directory)
    assert not tokenizer.has_chat_template
    _refused(lambda: tokenizer.apply_chat_template(CHATS[0]), "no chat template", str(directory))


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("Hi", "str"),
        ({"role": "user", "content": "Hi"}, "dict"),
        ([], "no messages"),
        (["Hi"], "a message is a str"),
        ([{"content": "Hi"}], "role"),
        ([{"role": 3, "content": "Hi"}], "role"),
        ([{"role": "user"}], "fails|refuses"),
        ([{"role": "user", "content": ["Hi"]}], "fails|refuses"),
        (None, "NoneType"),
    ],
)
def test_messages_of_another_shape_are_refused(directory, messages, words):
    (directory / "chat_template.jinja").write_text(CHATML)
    tokenizer = Tokenizer.from_directory(directory)
    with pytest.raises(UsageError, match=words) as caught:
        tokenizer.apply_chat_template(messages)
    assert "role" in caught.value.hint


def test_what_a_template_objects_to_is_passed_on(directory):
    (directory / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    _refused(lambda: Tokenizer.from_directory(directory).apply_chat_template(CHATS[0]), "roles must alternate")


def test_a_broken_template_is_named_with_its_line(directory):
    (directory / "chat_template.jinja").write_text("a\n{% if %}")
    _refused(lambda: Tokenizer.from_directory(directory).apply_chat_template(CHATS[0]), "line 2", str(directory))


def test_a_tool_that_is_no_schema_is_refused(directory):
    (directory / "chat_template.jinja").write_text(CHATML)
    _refused(lambda: Tokenizer.from_directory(directory).apply_chat_template(CHATS[0], tools=[len]), "a tool is")


# What cannot be done


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["a"]])
def test_only_text_is_encoded(directory, text):
    _refused(lambda: Tokenizer.from_directory(directory).encode(text), type(text).__name__)


def test_half_a_surrogate_pair_is_refused(directory):
    _refused(lambda: Tokenizer.from_directory(directory).encode("a\ud800b"), "Unicode")


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"], [1.5]])
def test_only_token_ids_are_decoded(directory, ids):
    _refused(lambda: Tokenizer.from_directory(directory).decode(ids), "cannot decode")


def test_a_directory_without_tokenizer_takes_ids_alone(directory):
    (directory / "tokenizer.json").unlink()
    _write(directory, "generation_config.json", eos_token_id=[3, 4], bos_token_id=1)
    tokenizer = Tokenizer.from_directory(directory)
    assert not tokenizer.has_vocabulary
    assert tokenizer.eos_token_ids == (3, 4)
    assert tokenizer.bos_token_id == 1
    _refused(lambda: tokenizer.encode("a"), "no tokenizer", str(directory))
    _refused(lambda: tokenizer.decode([1]), "no tokenizer")


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.json"]
)
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_files_are_named(directory, name, content):
    (directory / name).write_text(content)
    _refused(lambda: Tokenizer.from_directory(directory), name, error=BadInputError)


def test_a_damaged_vocabulary_is_named(directory):
    (directory / "tokenizer.json").write_text("{}")
    _refused(lambda: Tokenizer.from_directory(directory).encode("a"), "tokenizer.json", error=BadInputError)


def test_a_missing_directory_is_named(tmp_path):
    _refused(lambda: Tokenizer.from_directory(tmp_path / "no"), str(tmp_path / "no"), error=BadInputError)


def test_it_needs_no_heavy_library(directory):
    (directory / "chat_template.jinja").write_text(CHATML)
    script = (
        "import sys; from trtllm.runtime.tokenizer import Tokenizer; t = Tokenizer.from_directory(sys.argv[1]);"
        "t.decode(t.encode(t.apply_chat_template([{'role': 'user', 'content': 'Hi'}])));"
        "print({'torch', 'transformers', 'onnx', 'gguf', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(directory)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
def test_minilm_is_tokenized_as_by_transformers(minilm_directory, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copy(minilm_directory / name, tmp_path / name)
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_directory(tmp_path)
    _check_parity(tokenizer, AutoTokenizer.from_pretrained(minilm_directory))
    assert (tokenizer.vocab_size, tokenizer.pad_token_id) == (30522, 0)


@pytest.mark.slow
def test_smollm2_is_tokenized_as_by_transformers(smollm2_gguf, tmp_path):
    from trtllm.frontends.detect import open_model

    for name, content in open_model(smollm2_gguf).assets.items():
        (tmp_path / name).write_bytes(content)
    tokenizer, reference = Tokenizer.from_directory(tmp_path), _reference(tmp_path)
    _check_parity(tokenizer, reference)
    assert tokenizer.eos_token_ids == (2,)
    for chat in CHATS:
        expected = reference.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer.apply_chat_template(chat) == expected
