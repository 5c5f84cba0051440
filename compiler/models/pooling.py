"""How an encoder's token states become one vector: what the user asked for, else what the checkpoint's files say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.compiler.models.sentence_files import MODULES, POOLING, sentence_file
from trtllm.config import BuildConfig
from trtllm.errors import UnsupportedModelError

_KINDS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
"""What sentence-transformers calls the kinds, to the dialect's names."""
_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Pooling:
    """Kind of the dialect's Pool, "none" for the states of every token, and whether vectors get length 1."""

    kind: str
    normalize: bool


def pooling_of(checkpoint: Checkpoint, build: BuildConfig) -> Pooling:
    """The build's `pooling` and `normalize_embeddings`, where they say "auto" those of the sentence-transformers files.

    A checkpoint without such files is pooled by the mean and not normalised.
    Raises UnsupportedModelError when the files ask for what has no form here.
    """
    modules = [] if build.pooling != "auto" else _modules(checkpoint)
    kind = _published_kind(checkpoint) if build.pooling == "auto" else build.pooling
    normalize = build.normalize_embeddings
    if normalize is None:
        normalize = "Normalize" in (modules or _modules(checkpoint))
    return Pooling(kind, normalize)


def _modules(checkpoint: Checkpoint) -> list[str]:
    """Class names of the modules that follow each other in a sentence-transformers model."""
    entries = sentence_file(checkpoint, MODULES) or []
    names = [str(entry.get("type", "")).rpartition(".")[2] for entry in entries]
    unknown = [name for name in names if name not in _MODULES]
    if unknown:
        raise UnsupportedModelError(
            f"{checkpoint.source}: {MODULES} has module {', '.join(unknown)} after the encoder",
            f"supported: {', '.join(_MODULES)}; --pooling and normalize_embeddings leave the others out",
        )
    return names


def _published_kind(checkpoint: Checkpoint) -> str:
    config = sentence_file(checkpoint, POOLING)
    if config is None:
        return "mean"
    given = _given_modes(config)
    if len(given) == 1 and given[0] in _KINDS:
        return _KINDS[given[0]]
    raise UnsupportedModelError(
        f"{checkpoint.source}: {POOLING} asks for pooling {' + '.join(given) or 'of no kind'}",
        f"supported is one of {', '.join(_KINDS)}; --pooling chooses another",
    )


def _given_modes(config: Mapping[str, Any]) -> list[str]:
    """The modes that are on: `pooling_mode` names them, or in older files one flag each."""
    named = config.get("pooling_mode")
    if named is not None:
        return [named] if isinstance(named, str) else [str(mode) for mode in named]
    flags = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    return [key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens") for key in flags]
