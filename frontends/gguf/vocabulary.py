"""Reads the vocabulary of a GGUF file: tokens, their kinds, and which of them begin and end texts."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trtllm.errors import BadInputError
from trtllm.frontends.gguf.metadata import Metadata

_ROLES = {
    "bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id",
    "sep": "seperator_token_id", "cls": "cls_token_id", "mask": "mask_token_id",
}  # fmt: skip
"""Roles in the words of transformers; one key is misspelt in the format itself."""
_BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
"""Pre-tokenizers of gpt2 vocabularies that begin texts with BOS unless told otherwise (llama.cpp, llama-vocab.cpp)."""


class TokenKind(enum.IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The `tokenizer.ggml.*` metadata, checked against each other."""

    model: str
    """"gpt2" (byte-level BPE), "llama" (sentencepiece BPE), "bert" (wordpiece)."""
    pre: str | None
    """Name of the rule that cuts text into words before BPE."""
    architecture: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None
    merges: list[tuple[str, str]] | None
    roles: Mapping[str, int]
    """Token ids by role: "bos", "eos", "unk", "pad", "sep", "cls", "mask"."""
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    def of_kind(self, *kinds: TokenKind) -> Iterator[str]:
        return (token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds)

    def token(self, role: str) -> str | None:
        return self.tokens[self.roles[role]] if role in self.roles else None


def read_vocabulary(metadata: Metadata) -> Vocabulary | None:
    """The vocabulary, or None when the file has none. Raises BadInputError when its parts contradict each other."""
    model, tokens = metadata.text("model"), metadata.sequence("tokens")
    if model is None or model == "none" or tokens is None:
        return None
    if not all(isinstance(token, str) for token in tokens):
        raise _fault(metadata, "tokens that are not strings")
    pre = metadata.text("pre")
    add_bos, add_eos = metadata.flag("add_bos_token"), metadata.flag("add_eos_token")
    space = metadata.flag("add_space_prefix")
    return Vocabulary(
        model=model,
        pre=pre,
        architecture=str(metadata.values.get("general.architecture")),
        tokens=tokens,
        kinds=_per_token(metadata, "token_type", len(tokens)) or [TokenKind.NORMAL] * len(tokens),
        scores=_per_token(metadata, "scores", len(tokens)),
        merges=_merges(metadata),
        roles=_roles(metadata, len(tokens)),
        add_bos=add_bos if add_bos is not None else model != "gpt2" or pre in _BOS_BY_DEFAULT,
        add_eos=add_eos if add_eos is not None else model == "bert",
        add_space_prefix=space if space is not None else model == "llama",
    )


def _per_token(metadata: Metadata, key: str, count: int) -> list[Any] | None:
    values = metadata.sequence(key)
    if values is not None and len(values) != count:
        raise _fault(metadata, f"{len(values)} values under '{metadata.prefix}.{key}' for {count} tokens")
    return values


def _merges(metadata: Metadata) -> list[tuple[str, str]] | None:
    """Pairs; a merge is written with one space between its parts, and a part may begin with a space."""
    merges = metadata.sequence("merges")
    if merges is None:
        return None
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1) if isinstance(merge, str) else -1
        if cut < 1 or cut == len(merge) - 1:
            raise _fault(metadata, f"a merge {merge!r}, expected two tokens")
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _roles(metadata: Metadata, count: int) -> dict[str, int]:
    roles = {}
    for role, key in _ROLES.items():
        index = metadata.optional_integer(key)
        if index is None:
            continue
        if index >= count:
            raise _fault(metadata, f"token {index} under '{metadata.prefix}.{key}', the vocabulary has {count}")
        roles[role] = index
    return roles


def _fault(metadata: Metadata, what: str) -> BadInputError:
    return BadInputError(f"{metadata.path} has {what}", "the file is damaged; convert the model again")
