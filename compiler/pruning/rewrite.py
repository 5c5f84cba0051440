"""Prunes a model for good: measures it, writes what stays, and reports size, speed and perplexity before and after."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint, LazyTensor
from trtllm.checkpoints.safetensors_writer import StoredTensor, write_safetensors
from trtllm.compiler.calibration.dataset import calibration_tokens
from trtllm.compiler.conversion import convert_checkpoint, write_assets, write_checkpoint_manifest
from trtllm.compiler.engine import check_free, writing
from trtllm.compiler.pipeline import build_engine
from trtllm.compiler.pruning.measurement import measure
from trtllm.compiler.pruning.model import PruningScheme, prune_model
from trtllm.config import build_config
from trtllm.frontends.detect import open_model
from trtllm.progress import Progress, Silent
from trtllm.runtime.perplexity import perplexity, scoring_session

_DECODED = 32
_RUNS = 3
_WINDOWS, _WINDOW = 12, 1024
"""Of a text that is only scored, and tokens of each."""


@dataclass(frozen=True)
class PruningText:
    """The text that importance is measured on, and that perplexity is; None for the text of the package.

    Where no other text is given to score, it is a part of the one text that is not measured on: its last rows.
    """

    dataset: str | None = None
    samples: int = 32
    length: int = 256
    scored: int = 8
    evaluation: str | None = None
    """A text of its own to score: its first 12 windows of 1024 tokens."""


@dataclass(frozen=True)
class Quality:
    """Of one model, built in float32 for this machine."""

    weights_bytes: int
    engine_bytes: int
    parameters: int
    zeros: float
    """Share of the weights that are zero."""
    tokens_per_second: float
    """Decoded one by one by a single sequence, the best of three runs."""
    perplexity: float


@dataclass(frozen=True)
class Rewritten:
    path: Path
    before: Quality
    after: Quality

    def to_json(self) -> dict[str, Any]:
        return {"before": asdict(self.before), "after": asdict(self.after)}


def rewrite_model(
    model: str | Path, output_dir: Path, scheme: PruningScheme, progress: Progress,
    *, text: PruningText | None = None, format: Literal["huggingface", "trtllm"] = "huggingface", threads: int = 0,
) -> Rewritten:  # fmt: skip
    """Writes the pruned model to `output_dir`, which must not exist."""
    text = text or PruningText()
    check_free(output_dir.absolute())
    checkpoint = open_model(model, notify=progress.note)
    limit = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions") or text.length
    calibration, scored = _tokens(checkpoint, text, limit)
    found = measure(checkpoint, calibration, progress, threads=threads)
    pruned = prune_model(checkpoint, scheme, found)
    with tempfile.TemporaryDirectory(prefix="trtllm-prune-") as folder:
        progress.stage("scoring the model")
        before = _quality(model, checkpoint, scored, Path(folder) / "before", threads)
        if format == "huggingface":
            write_huggingface(pruned, output_dir, progress)
        else:
            convert_checkpoint(pruned, output_dir, progress=progress)
        progress.stage("scoring the pruned model")
        after = _quality(output_dir, open_model(output_dir), scored, Path(folder) / "after", threads)
    return Rewritten(output_dir, before, after)


def _tokens(checkpoint: Checkpoint, text: PruningText, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to measure on, and rows to score."""
    length = min(text.length, limit)
    if text.evaluation is not None:
        scored = calibration_tokens(checkpoint, text.evaluation, _WINDOWS, min(_WINDOW, limit))
        return calibration_tokens(checkpoint, text.dataset, text.samples, length), scored
    tokens = calibration_tokens(checkpoint, text.dataset, text.samples + text.scored, length)
    held_out = max(1, min(text.scored, len(tokens) // 4))
    return (tokens[:-held_out] if len(tokens) > 1 else tokens), tokens[-held_out:]


def write_huggingface(checkpoint: Checkpoint, output_dir: Path, progress: Progress) -> None:
    """Writes a Hugging Face directory: config.json, model.safetensors and the tokenizer's files."""
    config = {**checkpoint.config, "architectures": [checkpoint.architecture]}
    with writing(output_dir) as writer:
        progress.stage("writing the pruned model", checkpoint.nbytes)
        stored = [StoredTensor(tensor.spec, _Chunks(tensor)) for tensor in checkpoint.tensors.values()]
        written = write_safetensors(writer.folder / "model.safetensors", stored, progress)
        writer.file_hashes["model.safetensors"] = written.sha256
        writer.write_bytes("config.json", (json.dumps(config, indent=2) + "\n").encode())
        write_assets(writer, checkpoint)
        write_checkpoint_manifest(writer, checkpoint.source, {"model.safetensors": written})


class _Chunks:
    """A tensor's payload as one piece."""

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor = tensor

    def __call__(self) -> list[np.ndarray]:
        return [self._tensor.read()]


def _quality(model: str | Path, checkpoint: Checkpoint, tokens: np.ndarray, folder: Path, threads: int) -> Quality:
    context = tokens.shape[1]
    build = build_config(
        {"dtype": "float32", "max_seq_len": context, "max_batch_size": 1, "gather_context_logits": True}
    )
    engine = build_engine(model, folder, build, progress=Silent())
    score = perplexity(engine, tokens.reshape(-1), context, threads=threads or None)
    session: Any = scoring_session(engine, context, threads or None)
    zeros, count = 0, 0
    for tensor in checkpoint.tensors.values():
        values = tensor.read()
        zeros += values.size - int(np.count_nonzero(values))
        count += values.size
    speed = max(_decode_speed(session, tokens[0]) for _ in range(_RUNS))
    return Quality(checkpoint.nbytes, engine.nbytes, count, zeros / count, speed, score.perplexity)


def _decode_speed(session: Any, tokens: np.ndarray) -> float:
    """Tokens a second of one sequence, after one token of warming up."""
    size = session.info.cache.tokens_per_block
    table = np.arange(-(-session.info.max_seq_len // size), dtype=np.int32)[None]
    tables = [table for _ in session.info.cache.groups]
    count, begun = min(_DECODED, len(tokens) - 1), 0.0
    for place in range(count + 1):
        if place == 1:
            begun = time.perf_counter()
        session.step(
            tokens[place : place + 1], np.array([place]), np.array([0, 1]), np.array([place]), np.array([0]), tables
        )
    return count / (time.perf_counter() - begun)
