"""Whether two tokenizers give tokens the same numbers: an engine whose weights mean other tokens speaks gibberish."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class TokenizerDifference:
    """How another tokenizer differs from the engine's."""

    renumbered: int
    """Token numbers that stand for another token, or for one in only one of the two."""
    tokens: int
    """Numbers that either has."""
    example: str = ""
    """The first of them: "17 is 'a' there and 'b' here"."""

    @property
    def line(self) -> str:
        if self.renumbered:
            return f"{self.renumbered} of {self.tokens} token numbers mean other tokens (number {self.example})"
        return "the tokens have the same numbers, but text is cut into them by other rules"


def tokenizer_difference(own: Path, other: bytes | Path | None) -> TokenizerDifference | None:
    """How `other` differs from the engine's tokenizer.json; None when it is equal, or when either is not there."""
    if other is None or not own.is_file():
        return None
    mine, theirs = own.read_bytes(), other if isinstance(other, bytes) else other.read_bytes()
    if mine == theirs:
        return None
    one, two = _parsed(mine), _parsed(theirs)
    if one == two:
        return None
    here, there = dict(_numbered(one)), dict(_numbered(two))
    different = sorted(number for number in here.keys() | there.keys() if here.get(number) != there.get(number))
    example = ""
    if different:
        first = different[0]
        example = f"{first} is {_quoted(there.get(first))} there and {_quoted(here.get(first))} in the engine"
    return TokenizerDifference(len(different), len(here.keys() | there.keys()), example)


def _parsed(content: bytes) -> Mapping[str, Any]:
    try:
        data = json.loads(content)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _numbered(tokenizer: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """Every token by its number: a map (BPE, WordPiece, WordLevel) or a list (Unigram), and those that were added."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from ((number, token) for token, number in vocabulary.items())
    elif isinstance(vocabulary, list):
        yield from ((number, str(entry[0])) for number, entry in enumerate(vocabulary) if entry)
    for entry in tokenizer.get("added_tokens") or ():
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            yield entry["id"], str(entry.get("content"))


def _quoted(token: str | None) -> str:
    return "nothing" if token is None else repr(token)
