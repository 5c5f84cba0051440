"""Text to token ids and back, and chat messages to text, from the tokenizer files of an engine directory.

It needs the `tokenizers` and `jinja2` packages alone and gives what transformers' fast tokenizer gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from trtllm.errors import BadInputError, UsageError
from trtllm.runtime.chat_template import ChatTemplates, Message
from trtllm.runtime.tokenizer_files import TokenizerFiles, read_tokenizer_files

_CLEANED_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
"""What `clean_up_tokenization_spaces` replaces, in transformers' order."""


class Tokenizer:
    """The tokenizer of one engine. Encoding and decoding are thread safe."""

    def __init__(self, files: TokenizerFiles) -> None:
        self._files = files
        self._templates = ChatTemplates(files.directory, files.chat_templates, files.special_tokens)

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """The tokenizer whose files are in `directory`. Raises BadInputError for a damaged file.

        A directory without tokenizer.json gives a tokenizer that knows its special ids, if any, and refuses text.
        """
        return cls(read_tokenizer_files(Path(directory)))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens`, between the tokens that begin and end a text."""
        if not isinstance(text, str):
            raise UsageError(f"cannot tokenize a {type(text).__name__}", "pass a string")
        try:
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except (TypeError, UnicodeEncodeError):  # the library cannot take a lone surrogate
            raise UsageError("a text is not valid Unicode: it holds half of a surrogate pair", "repair it") from None

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """The text of `ids`. Raises UsageError for an id that is no count; ids beyond the vocabulary give nothing.

        Without `spaces_between_special_tokens`, special tokens that are shown stand directly beside their neighbours,
        also where the tokenizer puts a space between tokens.
        """
        if skip_special_tokens or spaces_between_special_tokens:
            text = self.decode_raw(ids, skip_special_tokens=skip_special_tokens)
        else:
            text = "".join(self._parts_between_special_tokens(ids))
        return clean_up(text) if self.cleans_up_spaces else text

    def decode_raw(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of `ids` before spaces are cleaned up."""
        try:
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise UsageError(f"cannot decode {str(list(ids))[:60]}", "token ids are integers from 0 on") from None
        return text

    def _parts_between_special_tokens(self, ids: Sequence[int]) -> Iterator[str]:
        plain: list[int] = []
        for token_id in ids:
            if token_id not in self.special_token_ids:
                plain.append(token_id)
                continue
            yield self.decode_raw(plain)
            yield self.id_to_token(token_id) or ""
            plain = []
        yield self.decode_raw(plain)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The conversation as the model was trained to read it; encode it without special tokens.

        `extra` goes to the template by name, such as `enable_thinking=False`. Raises UsageError when the engine has no
        chat template, the messages are of another shape, or the template refuses them.
        """
        return self._templates.render(messages, tools, add_generation_prompt, extra)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a generation: of generation_config.json, or else the tokenizer's, or else the model's."""
        return self._files.eos_token_ids or self._ids_of("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        return next(iter(self.eos_token_ids), None)

    @property
    def bos_token_id(self) -> int | None:
        return next(iter(self._ids_of("bos_token")), self._files.bos_token_id)

    @property
    def pad_token_id(self) -> int | None:
        return next(iter(self._ids_of("pad_token")), self._files.pad_token_id)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Special tokens by role: "bos_token", "eos_token", ..."""
        return self._files.special_tokens

    @property
    def has_chat_template(self) -> bool:
        return bool(self._files.chat_templates)

    @property
    def has_vocabulary(self) -> bool:
        """Whether text can be encoded at all."""
        return self._files.vocabulary is not None

    @cached_property
    def vocab_size(self) -> int:
        """Tokens, added ones included. The model's own vocabulary may be padded beyond."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for an id beyond the vocabulary."""
        found: str | None = self._backend.id_to_token(token_id)
        return found

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that `skip_special_tokens` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def decoder_kinds(self) -> tuple[str, ...]:
        """The steps that make text of tokens, by type ("ByteLevel", "Fuse", ...); none where tokens are just joined."""
        decoder = self._backend.decoder
        return () if decoder is None else _step_types(json.loads(decoder.__getstate__()))

    @property
    def vocabulary_file(self) -> Path | None:
        """tokenizer.json"""
        return self._files.vocabulary

    def _ids_of(self, role: str) -> tuple[int, ...]:
        token = self._files.special_tokens.get(role)
        if token is None or not self.has_vocabulary:
            return ()
        found = self.token_to_id(token)
        return () if found is None else (found,)

    @cached_property
    def cleans_up_spaces(self) -> bool:
        """Clean-up was made for wordpieces; transformers ignores the flag for BPE, where it would corrupt the text."""
        return self._files.cleans_up_spaces and type(self._backend.model).__name__ != "BPE"

    @cached_property
    def _backend(self) -> Any:
        if self._files.vocabulary is None:
            raise UsageError(
                f"{self._files.directory} has no tokenizer", "pass token ids, and detokenize=False, instead of text"
            )
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_file(str(self._files.vocabulary))
        except Exception as error:  # the library raises plain Exception
            raise BadInputError(
                f"{self._files.vocabulary} is no tokenizer: {error}", "build the engine again"
            ) from None
        backend.no_truncation()
        backend.no_padding()
        self._mark_special(backend)
        return backend

    def _mark_special(self, backend: Any) -> None:
        """Tokens with a role are special even where tokenizer.json holds them as plain ones."""
        from tokenizers import AddedToken

        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        plain = [token for token in self._files.special_tokens.values() if token not in added]
        known = [token for token in dict.fromkeys(plain) if backend.token_to_id(token) is not None]
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])


def clean_up(text: str) -> str:
    """`text` without the spaces before punctuation that joining wordpieces leaves, as transformers removes them."""
    for spaced, joined in _CLEANED_UP:
        text = text.replace(spaced, joined)
    return text


def _step_types(state: Mapping[str, Any]) -> tuple[str, ...]:
    if state["type"] == "Sequence":
        return tuple(kind for step in state["decoders"] for kind in _step_types(step))
    return (str(state["type"]),)
