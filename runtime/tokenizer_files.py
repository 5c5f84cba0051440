"""Reads what the tokenizer files of an engine directory say: special tokens, ids, chat templates, flags."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm.errors import BadInputError

_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, eq=False)
class TokenizerFiles:
    """What the files say; what they do not say is None or empty."""

    directory: Path
    vocabulary: Path | None
    """tokenizer.json"""
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str]
    """By name; the one without a name is "default"."""
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    cleans_up_spaces: bool


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Reads the files in `directory`. Raises BadInputError for one that is damaged."""
    if not directory.is_dir():
        raise BadInputError(f"there is no directory {directory}", "check the path")
    config = _read_object(directory / "tokenizer_config.json")
    generation = _read_object(directory / "generation_config.json")
    model = _read_object(directory / "config.json")
    model = model.get("pretrained_config", model)
    vocabulary = directory / "tokenizer.json"
    special = {**_special_tokens(_read_object(directory / "special_tokens_map.json")), **_special_tokens(config)}
    return TokenizerFiles(
        directory=directory,
        vocabulary=vocabulary if vocabulary.is_file() else None,
        special_tokens=special,
        chat_templates=_chat_templates(directory, config),
        eos_token_ids=_ids(generation, "eos_token_id")
        or (() if "eos_token" in special else _ids(model, "eos_token_id")),
        bos_token_id=_first(_ids(generation, "bos_token_id") or _ids(model, "bos_token_id")),
        pad_token_id=_first(_ids(generation, "pad_token_id") or _ids(model, "pad_token_id")),
        cleans_up_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
    )


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; nothing when there is no such file."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"cannot read {path}: {error}", "build the engine again") from None
    if not isinstance(data, dict):
        raise BadInputError(f"{path} holds a JSON {type(data).__name__}, expected an object", "build the engine again")
    return data


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Tokens by role; a token is a string or an object with its `content`."""
    tokens = {}
    for role in _ROLES:
        value = config.get(role)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[role] = value
    return tokens


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The first of chat_template.jinja, chat_template.json and the tokenizer's config that exists."""
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        try:
            return {"default": jinja.read_bytes().decode("utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise BadInputError(f"cannot read {jinja}: {error}", "build the engine again") from None
    given = _read_object(directory / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        entries = [entry for entry in given if isinstance(entry, dict)]
        return {str(entry.get("name")): str(entry.get("template")) for entry in entries}
    return {}


def _ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, int) and not isinstance(item, bool))


def _first(ids: tuple[int, ...]) -> int | None:
    return ids[0] if ids else None
