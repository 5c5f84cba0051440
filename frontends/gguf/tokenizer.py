"""Builds a tokenizer.json from the vocabulary of a GGUF file, with the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, processors

from trtllm.frontends.gguf.byte_level import UnknownTokenizer, byte_level_tokenizer
from trtllm.frontends.gguf.sentencepiece import sentencepiece_tokenizer
from trtllm.frontends.gguf.vocabulary import TokenKind, Vocabulary
from trtllm.frontends.gguf.wordpiece import wordpiece_tokenizer

__all__ = ["BuiltTokenizer", "UnknownTokenizer", "build_tokenizer"]


@dataclass(frozen=True)
class BuiltTokenizer:
    """The bytes of tokenizer.json, and what was guessed for it."""

    data: bytes
    notes: tuple[str, ...]


_BUILDERS: Mapping[str, Callable[[Vocabulary], tuple[Tokenizer, tuple[str, ...]]]] = {
    "gpt2": byte_level_tokenizer,
    "llama": sentencepiece_tokenizer,
    "bert": wordpiece_tokenizer,
}


def build_tokenizer(vocabulary: Vocabulary) -> BuiltTokenizer:
    """Raises UnknownTokenizer for a kind of vocabulary or pre-tokenizer without a rule here."""
    builder = _BUILDERS.get(vocabulary.model)
    if builder is None:
        raise UnknownTokenizer(f"tokenizer '{vocabulary.model}' is not read (read are {', '.join(_BUILDERS)})")
    try:
        tokenizer, notes = builder(vocabulary)
    except UnknownTokenizer:
        raise
    except Exception as error:  # the library raises plain Exception, for merges out of its vocabulary
        raise UnknownTokenizer(f"the tokenizer could not be rebuilt ({error})") from None
    _add_special_tokens(tokenizer, vocabulary)
    _begin_and_end(tokenizer, vocabulary)
    return BuiltTokenizer(tokenizer.to_str().encode("utf-8"), notes)


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control tokens are special; user-defined ones are matched whole but stay in decoded text."""
    special = list(vocabulary.of_kind(TokenKind.CONTROL, TokenKind.UNKNOWN))
    if vocabulary.model == "bert":
        special += [token for role in vocabulary.roles if (token := vocabulary.token(role)) is not None]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(special)]
    )
    plain = vocabulary.of_kind(TokenKind.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in plain])


def _begin_and_end(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """The template that puts BOS before and EOS after a text (CLS and SEP for wordpiece)."""
    first, last = ("cls", "sep") if vocabulary.model == "bert" else ("bos", "eos")
    begin = vocabulary.token(first) or (vocabulary.token("bos") if vocabulary.model == "bert" else None)
    end = vocabulary.token(last) or (vocabulary.token("eos") if vocabulary.model == "bert" else None)
    begin, end = begin if vocabulary.add_bos else None, end if vocabulary.add_eos else None
    if begin is None and end is None:
        return
    head, tail = [begin] if begin else [], [end] if end else []
    middle = [end, "$B:1", end] if vocabulary.model == "bert" and end else [*tail, *head, "$B:1", *tail]
    special = [(token, vocabulary.tokens.index(token)) for token in {*head, *tail}]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*head, "$A", *tail], pair=[*head, "$A", *_typed(middle)], special_tokens=special
    )


def _typed(pieces: list[str]) -> list[str]:
    """The pieces after the first text; what follows the second text's start is of its type."""
    start = pieces.index("$B:1")
    return [*pieces[:start], *(piece if piece.endswith(":1") else f"{piece}:1" for piece in pieces[start:])]
