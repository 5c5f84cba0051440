"""Collects the files beside a model's weights that its engine needs: tokenizer, chat template, generation, pooling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trtllm.errors import BadInputError
from trtllm.frontends.json_files import read_json_object

_FLAT = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
_CHECKED = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.json")
_VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
POOLING = "1_Pooling/config.json"


@dataclass(frozen=True)
class ModelAssets:
    """Files by the name they have in a published model, and what the user should know of them."""

    files: dict[str, bytes | Path]
    notes: tuple[str, ...]


def collect_assets(directory: Path, known_tokenizer: Path | None = None) -> ModelAssets:
    """The assets in `directory`; a vocabulary without tokenizer.json is converted when transformers is installed.

    A tokenizer.json is loaded to see that it can be, unless it has the bytes of `known_tokenizer`.

    Raises BadInputError for a JSON file among them that is damaged.
    """
    files: dict[str, bytes | Path] = {name: directory / name for name in _FLAT if (directory / name).is_file()}
    for name in _CHECKED:
        if name in files:
            read_json_object(directory / name)
    pooling = directory / POOLING
    if pooling.is_file():
        read_json_object(pooling)
        files[POOLING] = pooling
    if "tokenizer.json" in files:
        if known_tokenizer is None or not _same_bytes(directory / "tokenizer.json", known_tokenizer):
            _check_tokenizer(directory / "tokenizer.json")
        return ModelAssets(files, ())
    converted, note = _converted_tokenizer(directory)
    if converted:
        files["tokenizer.json"] = converted
    return ModelAssets(files, (note,))


def _same_bytes(one: Path, other: Path) -> bool:
    return other.is_file() and one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _check_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise BadInputError(f"{path} is no tokenizer: {error}", "fetch the file again") from None


def _converted_tokenizer(directory: Path) -> tuple[bytes | None, str]:
    vocabulary = next((name for name in _VOCABULARIES if (directory / name).is_file()), None)
    if vocabulary is None:
        return None, "no tokenizer found: the engine will take token ids only"
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None, (
            f"no tokenizer.json: {vocabulary} is converted only where transformers is installed; "
            "the engine will take token ids only"
        )
    try:
        backend = AutoTokenizer.from_pretrained(directory, local_files_only=True).backend_tokenizer
    except Exception as error:  # transformers raises whatever its converters meet
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            None,
            f"{vocabulary} could not be converted ({reason}); the engine will take token ids only",
        )
    return backend.to_str().encode(), f"tokenizer.json was made from {vocabulary}"
