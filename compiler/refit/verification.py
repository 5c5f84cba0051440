"""Holds a refitted engine against the new checkpoint: lowered afresh by the pipeline, and run on a few tokens."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Recipe
from trtllm.compiler.compiled import Compiled
from trtllm.compiler.engine import ENGINE, WEIGHTS, Engine
from trtllm.compiler.refit.report import listed
from trtllm.errors import BadInputError
from trtllm.progress import Progress
from trtllm.runtime.session import is_paged, open_session

_TOKENS = 8
_REFERENCE = ".reference"
"""A folder within the one that is being written, so that what clears up after a kill finds it."""
_EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10}


@dataclass(frozen=True)
class Verification:
    """How far the refitted engine is from a fresh build of the checkpoint."""

    method: str
    """"logits", "recipes" or "finite"."""
    tokens: int = 0
    error: float | None = None
    """The largest difference of a logit; 0 is what equal weights and equal kernels give."""
    tolerance: float | None = None
    """What sums in another order may differ by: eps of the type, the largest logit, the root of the terms' number."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        if self.method == "logits":
            return (
                f"verified: logits of {self.tokens} tokens differ by {self.error:.3g} (tolerance {self.tolerance:.3g})"
            )
        if self.method == "recipes":
            return "verified: a fresh lowering of the checkpoint makes the same graph and the same recipes"
        return "verified: the logits are finite; there is no fresh build of just these weights to compare them with"


def verify_against(
    engine: Engine,
    checkpoint: Checkpoint,
    compiled: Compiled,
    recipes: Mapping[str, Recipe],
    progress: Progress,
    threads: int = 0,
) -> Verification:
    """Compares with a fresh lowering: graph, recipes, the bytes of every weight, and logits. Raises BadInputError.

    The weights are made once more, a chunk at a time, and compared with the file as it is; then the fresh graph runs
    over that same file. So no second engine is written, and nothing is held in memory.
    """
    fresh = {weight.name: weight.recipe for weight in compiled.weights}
    if compiled.network_hash != engine.manifest.network_hash:
        raise _failed("a build of the checkpoint has another graph")
    different = [name for name, recipe in recipes.items() if fresh.get(name) != recipe]
    if different:
        raise _failed(f"a build of the checkpoint makes other weights: {listed(different)}")
    if engine.target != "onnxruntime":
        return Verification("recipes")
    _check_payloads(engine, checkpoint, compiled, progress, threads)
    found = some_logits(engine)
    expected = _reference_logits(engine, compiled)
    error = float(np.abs(expected - found).max())
    tolerance = _tolerance(engine, expected)
    if not error <= tolerance:
        raise _failed(f"logits differ by {error:.3g} from those of a fresh build, more than {tolerance:.3g}")
    return Verification("logits", _TOKENS, error, tolerance)


def _check_payloads(
    engine: Engine, checkpoint: Checkpoint, compiled: Compiled, progress: Progress, threads: int
) -> None:
    """The weights file holds what the fresh recipes make of the checkpoint, at the places that the manifest says."""
    entries = sorted(engine.manifest.weights, key=lambda entry: entry.offset)
    fresh = {weight.name: weight.recipe for weight in compiled.weights}
    reader = RecipeReader(checkpoint.tensors, threads=threads)
    progress.stage("verifying weights", sum(entry.nbytes for entry in entries))
    with (engine.path / WEIGHTS).open("rb", buffering=0) as file:
        written = bytearray()
        for entry in entries:
            place = entry.offset
            for chunk in reader.chunks(fresh[entry.name]):
                made = chunk.reshape(-1).view("u1")
                if len(written) < made.nbytes:
                    written = bytearray(made.nbytes)
                view = memoryview(written)[: made.nbytes]
                file.seek(place)
                count = file.readinto(view)
                if count != made.nbytes or not np.array_equal(np.frombuffer(view, np.uint8), made):
                    raise _failed(f"{entry.name} is not what the checkpoint gives")
                place += made.nbytes
                progress.advance(made.nbytes)


def _reference_logits(engine: Engine, compiled: Compiled) -> np.ndarray:
    """Of the fresh graph, over the weights that were compared with the checkpoint's."""
    from trtllm.compiler.targets.onnxruntime.emit import graph_bytes

    folder = engine.path / _REFERENCE
    folder.mkdir()
    try:
        offsets = {entry.name: entry.offset for entry in engine.manifest.weights}
        (folder / ENGINE).write_bytes(graph_bytes(compiled.network, offsets, folder))
        os.link(engine.path / WEIGHTS, folder / WEIGHTS)
        return some_logits(replace(engine, path=folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def verify_finite(engine: Engine) -> Verification:
    """Runs the engine on a few tokens. Raises BadInputError when its logits are not finite."""
    if engine.target != "onnxruntime":
        return Verification("recipes")
    if not np.isfinite(some_logits(engine)).all():
        raise _failed("the logits are not finite")
    return Verification("finite", _TOKENS)


def some_logits(engine: Engine) -> np.ndarray:
    """float32 logits, or embeddings, of a few fixed tokens."""
    vocabulary = engine.config["model"]["vocab_size"]
    count = min(_TOKENS, engine.config["build_config"]["max_input_len"])
    tokens = np.array([(index * 7919 + 3) % vocabulary for index in range(count)], np.int64)
    if engine.config["model"]["kind"] == "encoder":
        session = open_session(engine, threads=1)
        return np.array(session.encode(tokens[None], np.array([count], np.int64)))
    session = open_session(
        engine, threads=1, **({"num_blocks": 1, "max_batch_size": 1} if is_paged(engine.config) else {})
    )
    wanted = np.arange(count) if session.info.gathers_all_logits else np.array([count - 1])
    tables = [np.zeros((1, 1), np.int32) for _ in session.info.cache.groups]
    starts, past = np.array([0, count], np.int64), np.zeros(1, np.int64)
    logits = session.step(tokens, np.arange(count), starts, past, wanted.astype(np.int64), tables)
    return np.array(logits)


def _tolerance(engine: Engine, logits: np.ndarray) -> float:
    """Rounding errors of products of K terms in L layers add up like a walk: eps * sqrt(2 L K) * the largest value."""
    model = engine.config["model"]
    halves = any(item["dtype"] == "FLOAT16" for item in engine.config["io"]["inputs"])
    eps = _EPSILON["float16" if halves else "float32"]
    terms = max(1, 2 * model["num_layers"] * model["hidden_size"])
    return float(eps * math.sqrt(terms) * max(1.0, float(np.abs(logits).max())))


def _failed(what: str) -> BadInputError:
    return BadInputError(
        f"the refitted engine failed its verification: {what}",
        "nothing was written; build the engine anew, or say --no-verify if you know why it differs",
    )
