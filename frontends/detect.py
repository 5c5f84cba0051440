"""Opens a model whatever it is: looks at the contents, not at the name, and hands over to the frontend for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.errors import BadInputError, UsageError
from trtllm.frontends.foreign_formats import refuse_foreign_directory, refuse_foreign_file

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_READ = (
    "models that are read: a Hugging Face directory or hub id, a GGUF file, a checkpoint of trtllm-convert, "
    "a transformers object"
)
_LARGEST_HEADER = 100_000_000


def open_model(
    source: str | Path | object,
    *,
    tokenizer: Any = None,
    known_tokenizer: Path | None = None,
    notify: Callable[[str], None] | None = None,
) -> Checkpoint:
    """The model that `source` names (a path or `org/name[@revision]` on the hub) or is (a transformers model).

    `tokenizer` goes with a model object only. `notify` gets each of the checkpoint's notes, and progress of a download.
    `known_tokenizer` is a tokenizer.json that was found to be good before: a directory's own that has the same bytes is
    not loaded to see, which takes longer than reading a small model.
    Raises BadInputError for what is missing or damaged, UnsupportedModelError for what is known but not read.
    """
    checkpoint = _open(source, tokenizer, known_tokenizer, notify or _ignore)
    for note in checkpoint.notes:
        (notify or _ignore)(note)
    return checkpoint


def _ignore(note: str) -> None:
    pass


def _open(
    source: str | Path | object, tokenizer: Any, known_tokenizer: Path | None, notify: Callable[[str], None]
) -> Checkpoint:
    if not isinstance(source, str | Path):
        from trtllm.frontends.in_memory import read_model

        return read_model(source, tokenizer=tokenizer)
    if tokenizer is not None:
        raise UsageError("tokenizer= goes with a model object", "a path or hub id brings its own tokenizer files")
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_directory(path, known_tokenizer)
    if path.exists():
        return _open_file(path)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and not path.is_symlink():
        from trtllm.frontends.hub import read_hub_model

        return read_hub_model(source, notify=notify)
    raise BadInputError(f"there is no model at {source!s}", "check the path; " + _READ)


def _open_directory(directory: Path, known_tokenizer: Path | None = None) -> Checkpoint:
    from trtllm.frontends.trtllm_checkpoint import is_trtllm_checkpoint, read_trtllm_checkpoint

    if not (directory / "manifest.json").is_file() and is_trtllm_checkpoint(directory):
        return read_trtllm_checkpoint(directory)
    refuse_foreign_directory(directory)
    if (directory / "config.json").is_file() and not _is_gguf_only(directory):
        from trtllm.frontends.huggingface import read_directory

        return read_directory(directory, known_tokenizer=known_tokenizer)
    gguf_files = sorted(directory.glob("*.gguf"))
    if len(gguf_files) == 1:
        return _open_file(gguf_files[0])
    if gguf_files:
        names = ", ".join(file.name for file in gguf_files)
        raise UsageError(f"{directory} holds several GGUF models: {names}", "pass the path of one of them")
    raise BadInputError(f"{directory} is no model: it has no config.json", _READ)


def _is_gguf_only(directory: Path) -> bool:
    weights = any(next(directory.glob(pattern), None) for pattern in ("*.safetensors", "*.bin", "*.index.json"))
    return not weights and next(directory.glob("*.gguf"), None) is not None


def _open_file(file: Path) -> Checkpoint:
    head = _head(file)
    if head[:4] in (b"GGUF", b"FUGG"):
        from trtllm.frontends.gguf.reader import read_gguf

        return read_gguf(file)
    refuse_foreign_file(file, head)
    if file.name == "config.json":
        return _open_directory(file.parent)
    is_safetensors = head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER
    if is_safetensors or file.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        from trtllm.frontends.huggingface import read_file

        is_safetensors |= file.suffix == ".safetensors"
        return read_file(file, "safetensors" if is_safetensors else "PyTorch")
    if file.suffix == ".gguf":
        raise BadInputError(f"{file} is no GGUF file: it begins with {head[:4]!r}, not b'GGUF'", "fetch it again")
    raise BadInputError(f"{file} is of no known model format", _READ)


def _head(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(512)
    except OSError as error:
        raise BadInputError(f"cannot read {file}: {error.strerror}", "check the path and its permissions") from None
