"""Holds a refitted engine against the new checkpoint: lowered afresh by the pipeline, and run on a few tokens."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Recipe
from trtllm.compiler.compiled import Compiled
from trtllm.compiler.engine import Engine, open_engine
from trtllm.compiler.pipeline import write_engine
from trtllm.compiler.refit.report import listed
from trtllm.errors import BadInputError
from trtllm.progress import Progress, Silent
from trtllm.runtime.session import is_paged, open_session

REFERENCE_BYTES = 2_000_000_000
"""Weights of the largest engine whose reference is built whole; of a larger one the recipes are compared instead."""
_TOKENS = 8
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
    engine: Engine, checkpoint: Checkpoint, compiled: Compiled, recipes: Mapping[str, Recipe], progress: Progress
) -> Verification:
    """Compares with a fresh lowering. Raises BadInputError that says what differs."""
    fresh = {weight.name: weight.recipe for weight in compiled.weights}
    if compiled.network_hash != engine.manifest.network_hash:
        raise _failed("a build of the checkpoint has another graph")
    different = [name for name, recipe in recipes.items() if fresh.get(name) != recipe]
    if different:
        raise _failed(f"a build of the checkpoint makes other weights: {listed(different)}")
    if engine.target != "onnxruntime" or engine.manifest.weights_nbytes > REFERENCE_BYTES:
        return Verification("recipes")
    with tempfile.TemporaryDirectory(prefix=".trtllm-verify-", dir=engine.path.parent) as folder:
        write_engine(checkpoint, compiled, Path(folder) / "engine", Silent(), RecipeReader(checkpoint.tensors))
        reference = open_engine(Path(folder) / "engine", verify=False)
        expected, found = some_logits(reference), some_logits(engine)
    error = float(np.abs(expected - found).max())
    tolerance = _tolerance(engine, expected)
    if not error <= tolerance:
        raise _failed(f"logits differ by {error:.3g} from those of a fresh build, more than {tolerance:.3g}")
    return Verification("logits", _TOKENS, error, tolerance)


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
