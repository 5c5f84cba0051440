"""The text that calibration reads, as rows of tokens of one length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.errors import BadInputError, UsageError

DEFAULT_TEXT = "calibration.txt"


def calibration_tokens(checkpoint: Checkpoint, dataset: str | None, size: int, length: int) -> np.ndarray:
    """int64 [at most size, at most length]: the dataset's texts one after the other, cut into rows.

    Args:
        dataset: a file of JSON lines with a field "text", or of plain text; None for the text of the package.
        size: rows.
        length: tokens of a row; less when all of the text is shorter.

    Raises:
        BadInputError: a file that cannot be read or holds no text.
        UsageError: a model without tokenizer.
    """
    tokenizer = _tokenizer(checkpoint)
    pieces: list[int] = []
    for text in dataset_texts(dataset):
        pieces += tokenizer.encode(text, add_special_tokens=False).ids
        if len(pieces) >= size * length:
            break
    if len(pieces) < 2:
        hint = "calibration needs text, best 10,000 tokens or more"
        raise BadInputError(f"{dataset} holds {len(pieces)} tokens", hint)
    length = min(length, len(pieces))
    rows = min(size, len(pieces) // length)
    return np.asarray(pieces[: rows * length], np.int64).reshape(rows, length)


def dataset_texts(dataset: str | None) -> Iterator[str]:
    """The texts of a calibration file. Raises BadInputError that names the line at fault."""
    if dataset is None:
        yield resources.files("trtllm.compiler.calibration").joinpath(DEFAULT_TEXT).read_text(encoding="utf-8")
        return
    path = Path(dataset).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cannot read {path}: {error}", "give a UTF-8 file of JSON lines or plain text") from None
    if path.suffix not in (".jsonl", ".json"):
        yield from _paragraphs(lines)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _text_of(line, f"{path}, line {number}")


def _paragraphs(lines: list[str]) -> Iterator[str]:
    for start in range(0, len(lines), 64):
        yield "".join(lines[start : start + 64])


def _text_of(line: str, where: str) -> str:
    hint = 'each line is an object such as {"text": "..."}'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInputError(f"{where} is no JSON: {error}", hint) from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise BadInputError(f'{where} has no field "text" that is a string', hint)
    return str(record["text"]) + "\n\n"


def _tokenizer(checkpoint: Checkpoint) -> Any:
    import tokenizers

    content = checkpoint.assets.get("tokenizer.json")
    if content is None:
        raise UsageError(
            f"{checkpoint.source} has no tokenizer, so calibration text cannot be made tokens",
            "build from the published model, or choose a quantization that needs no calibration",
        )
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    return tokenizers.Tokenizer.from_str(data.decode("utf-8"))
