"""A constraint lets through exactly the outputs that its schema or grammar describes."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from trtllm.errors import TargetError, UsageError
from trtllm.runtime.guided_decoding import Constraint, GuidedDecoder, GuidedDecodingParams
from trtllm.runtime.tokenizer import Tokenizer

PADDED = 320
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<tool>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return Tokenizer.from_directory(folder)


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> GuidedDecoder:
    pytest.importorskip("llguidance", reason="guided decoding needs llguidance")
    return GuidedDecoder(tokenizer.vocabulary_file, PADDED, tokenizer.eos_token_ids)


def allowed(constraint: Constraint) -> list[int]:
    mask = np.zeros((PADDED + 31) // 32, np.uint32)
    assert constraint.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[PADDED:].any()
    return np.flatnonzero(bits).tolist()


def accepts(tokenizer: Tokenizer, constraint: Constraint, text: str) -> bool:
    for token in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]:
        assert token is not None
        if token not in allowed(constraint):
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize(
    ("wanted", "good", "bad"),
    [
        ({"json": SCHEMA}, ['{"name": "Ann", "age": 7}', '{"name":"","age":0}'], ['{"name": "Ann"}', '{"age": 7']),
        ({"json": json.dumps(SCHEMA)}, ['{"name": "é", "age": 99}'], ['{"name": "Ann", "age": 100}', "[]", ""]),
        ({"json_object": True}, ["{}", '{"a": [1, null]}'], ["[]", "{} {}", '{"a": }']),
        ({"regex": r"[0-9]{2}-[a-z]+"}, ["12-ab"], ["1-ab", "12-", "12-aB"]),
        ({"choice": ["yes", "no (never)"]}, ["yes", "no (never)"], ["ye", "no", "yesno"]),
        ({"grammar": 'root ::= "a" ("b" | "c")+'}, ["ab", "acb"], ["a", "ad"]),
        ({"grammar": 'start: "x" /[0-9]+/'}, ["x1", "x23"], ["x", "1"]),
        (
            {"structural_tag": {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}},
            ["free text", 'so <f>{"name": "A", "age": 1}</f> done'],
            ['so <f>{"name": "A"}</f>', "<f>hello</f>"],
        ),
        (
            {"structural_tag": {"structures": [{"begin": "<tool>", "schema": SCHEMA, "end": "."}]}},
            ['<tool>{"name": "A", "age": 1}.', "none"],
            ["<tool>1."],
        ),
    ],
)
def test_what_fits_is_allowed_and_what_does_not_is_not(
    tokenizer: Tokenizer, decoder: GuidedDecoder, wanted: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    fresh = decoder.constraint(GuidedDecodingParams(**wanted))
    assert {text: accepts(tokenizer, fresh.clone(), text) for text in [*good, *bad]} == dict.fromkeys(good, True) | (
        dict.fromkeys(bad, False)
    )


def test_a_pydantic_class_stands_for_its_schema(tokenizer: Tokenizer, decoder: GuidedDecoder) -> None:
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int

    fresh = decoder.constraint(GuidedDecodingParams(json=Point))
    assert accepts(tokenizer, fresh.clone(), '{"x": 1}')
    assert not accepts(tokenizer, fresh.clone(), '{"y": 1}')


def test_any_path_through_a_schema_ends_in_a_valid_document(tokenizer: Tokenizer, decoder: GuidedDecoder) -> None:
    chosen, ended = random.Random(3), 0
    fresh = decoder.constraint(GuidedDecodingParams(json=SCHEMA))
    for _ in range(30):
        constraint, tokens = fresh.clone(), []
        while len(tokens) < 200:
            options = [token for token in allowed(constraint) if tokenizer.decode([token]).strip() or token == 256]
            token = chosen.choice(options)
            if token == tokenizer.eos_token_id:
                break
            tokens.append(token)
            constraint.accept(token)
        else:
            continue
        document = json.loads(tokenizer.decode(tokens))
        assert set(document) == {"name", "age"} and 0 <= document["age"] <= 99
        ended += 1
    assert ended > 10


def test_another_end_token_ends_the_output_too(tokenizer: Tokenizer, decoder: GuidedDecoder) -> None:
    constraint = decoder.constraint(GuidedDecodingParams(choice=["a"]), end_ids=[257])
    constraint.accept(tokenizer.encode("a")[0])
    assert allowed(constraint) == [257]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"json": {"type": "objec"}}, "objec"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
        ({"json": "{"}, "json is no JSON"),
        ({"json": 3}, "expected a schema"),
        ({"regex": "(ab"}, "regex"),
        ({"grammar": "root ::= foo"}, "foo"),
        ({"structural_tag": {}}, "no 'structures'"),
        ({"structural_tag": {"structures": [{"begin": "x"}]}}, "no schema, end"),
        ({"structural_tag": {"structures": [{"begin": "x", "schema": {}, "end": ""}], "triggers": ["y"]}}, "trigger"),
    ],
)
def test_what_cannot_be_satisfied_is_refused_at_once(decoder: GuidedDecoder, wanted: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        decoder.constraint(GuidedDecodingParams(**wanted))


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({}, "exactly one of"),
        ({"regex": "a", "choice": ["b"]}, "not regex and choice"),
        ({"regx": "a"}, "did you mean 'regex'"),
        ({"choice": []}, "choice is empty"),
        ({"regex": 5}, "regex is 5"),
    ],
)
def test_exactly_one_kind_is_taken(wanted: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        GuidedDecodingParams(**wanted)


def test_without_the_package_its_installation_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(TargetError, match=r"trtllm-toolchain\[guided\]"):
        GuidedDecoder(tmp_path / "tokenizer.json", 10, [1]).constraint(GuidedDecodingParams(regex="a"))
