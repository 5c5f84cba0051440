"""Token ids to text as they come: the pieces put together are what `Tokenizer.decode` gives for all ids at once.

Text is given out when no further token can change it, so what ends in the middle of a character is held back.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

from trtllm.runtime.tokenizer import Tokenizer, clean_up

Decode = Callable[[Sequence[int]], str]


class TextStream(Protocol):
    """Turns tokens that are all shown into text."""

    def push(self, token_id: int) -> str:
        """The text that is sure now."""
        ...

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        ...


class IncrementalDetokenizer:
    """The text of one sequence, token by token. The cost of a token does not grow with the text before it."""

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skip_special_tokens
        self._splits = not skip_special_tokens and not spaces_between_special_tokens
        self._stream = _stream_for(tokenizer)
        self._cleaner = CleanUpStream() if tokenizer.cleans_up_spaces else None

    def push(self, token_id: int) -> str:
        """The text that is sure with one more token."""
        return self._cleaned(self._raw(token_id))

    def flush(self) -> str:
        """The rest of the text; the sequence has ended."""
        text = self._cleaned(self._stream.flush())
        return text if self._cleaner is None else text + self._cleaner.flush()

    def _raw(self, token_id: int) -> str:
        special = token_id in self._tokenizer.special_token_ids
        if self._tokenizer.id_to_token(token_id) is None or (special and self._skips_special):
            return ""
        if not (special and self._splits):
            return self._stream.push(token_id)
        before = self._stream.flush()
        self._stream = _stream_for(self._tokenizer)
        return before + (self._tokenizer.id_to_token(token_id) or "")

    def _cleaned(self, text: str) -> str:
        return text if self._cleaner is None else self._cleaner.push(text)


class ByteLevelStream:
    """For byte-level tokens: each stands for bytes, and the text is their UTF-8."""

    def __init__(self, id_to_token: Callable[[int], str | None]) -> None:
        self._id_to_token = id_to_token
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        token = self._id_to_token(token_id) or ""
        return self._utf8.decode(_token_bytes(token))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class WindowStream:
    """For all other tokens: decodes a few of the newest together with some before them, and gives the difference.

    A run of tokens that `is_byte` (<0xE2>) is decoded as a whole, because one wrong byte spoils all of it.
    """

    def __init__(self, decode: Decode, is_byte: Callable[[int], bool]) -> None:
        self._decode = decode
        self._is_byte = is_byte
        self._context: list[int] = []
        self._context_text = ""
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        self._new.append(token_id)
        return "" if self._is_byte(token_id) else self._advance()

    def flush(self) -> str:
        return self._advance() if self._new else ""

    def _advance(self) -> str:
        """Gives out the new tokens; they become the context, which reaches back to where it has text of its own."""
        text = self._decode([*self._context, *self._new])
        given = text[len(self._context_text) :]
        alone = self._decode(self._new)
        if alone:
            self._context, self._context_text = self._new, alone
        else:
            self._context, self._context_text = [*self._context, *self._new], text
        self._new = []
        return given


class CleanUpStream:
    """Removes the spaces that `clean_up` removes, from text in pieces: a word is given out when the next one begins."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> str:
        self._held += text
        end = self._last_boundary()
        ready, self._held = self._held[:end], self._held[end:]
        return clean_up(ready)

    def flush(self) -> str:
        text, self._held = clean_up(self._held), ""
        return text

    def _last_boundary(self) -> int:
        """The last place that no replacement reaches across: a space between words, away from apostrophes."""
        held = self._held
        for place in range(len(held) - 2, 0, -1):
            if held[place] == " " and held[place - 1] not in " '" and held[place + 1] not in " '":
                return place
        return 0


def _stream_for(tokenizer: Tokenizer) -> TextStream:
    kinds = tokenizer.decoder_kinds
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return ByteLevelStream(tokenizer.id_to_token)
    falls_back = "ByteFallback" in kinds
    return WindowStream(tokenizer.decode_raw, lambda token_id: falls_back and _is_byte(tokenizer, token_id))


def _is_byte(tokenizer: Tokenizer, token_id: int) -> bool:
    token = tokenizer.id_to_token(token_id) or ""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _token_bytes(token: str) -> bytes:
    """The bytes that a byte-level token's characters stand for; a token with other characters stands for itself."""
    table = _byte_of_character()
    try:
        return bytes([table[character] for character in token])
    except KeyError:
        return token.encode("utf-8")


@cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
