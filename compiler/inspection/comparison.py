"""How far an engine is from the model it was built from: logits, and layer by layer where the two part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.calibration.dataset import calibration_tokens
from trtllm.compiler.engine import Engine
from trtllm.compiler.inspection.graph import layer_of
from trtllm.compiler.inspection.quantization_error import quantization_errors
from trtllm.compiler.inspection.taps import LOGITS, EngineTaps, Tap, reference_taps
from trtllm.compiler.ir.network import Network
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.table import builder_for
from trtllm.compiler.refit.refit import engine_build
from trtllm.compiler.stripping import refuse_stripped
from trtllm.dtypes import DType
from trtllm.errors import BadInputError, UnsupportedModelError, UsageError
from trtllm.progress import Progress
from trtllm.runtime.perplexity import log_softmax

ROWS, LENGTH = 4, 128
"""Rows of the default text, and tokens of each."""
_EPSILON = {"FLOAT": 2.0**-23, "FLOAT16": 2.0**-10, "BFLOAT16": 2.0**-7}
_ROUNDED_ACTIVATIONS = 2.4 / 127 / math.sqrt(12)
"""Relative RMS of rounding 32 normal numbers, the largest of which is about 2.4 deviations, to 8 bits."""
_UNMEASURED = 2.4 / 8 / math.sqrt(12)
"""The same for 4 bits: what a quantized layer is allowed whose error cannot be measured."""


@dataclass(frozen=True)
class PlaceError:
    """The error of what goes into one norm, over all rows."""

    name: str
    """The norm's weight."""
    layer: int | None
    """The layer that computed it: that of the norm before it; None for embedded tokens."""
    relative_rms: float
    """Root mean square of the error over that of the model's values."""
    max_error: float
    tolerance: float

    @property
    def diverges(self) -> bool:
        return not self.relative_rms <= self.tolerance


@dataclass(frozen=True)
class Comparison:
    """An engine against its model in float32."""

    engine: str
    model: str
    rows: int
    tokens: int
    logits: int
    """Tokens whose logits were compared."""
    divergence: float
    """Mean Kullback-Leibler divergence of the engine's distribution from the model's, in nats."""
    agreement: float
    """Share of tokens for which both find the same next token likeliest."""
    max_error: float
    """Of a logit."""
    places: tuple[PlaceError, ...]

    @property
    def first_diverging(self) -> PlaceError | None:
        return next((place for place in self.places if place.diverges), None)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; an infinite or undefined number is the string "inf" or "nan"."""
        first = self.first_diverging
        return {
            **{key: _finite(value) for key, value in vars(self).items()},
            "places": [_place_json(place) for place in self.places],
            "first_diverging": _place_json(first) if first is not None else None,
        }


def _place_json(place: PlaceError) -> dict[str, Any]:
    return {key: _finite(value) for key, value in vars(place).items()}


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class ComparisonText:
    """What both read."""

    prompts: tuple[str, ...] = ()
    dataset: str | None = None
    """Of calibration's form; None for the package's own text, unless there are prompts."""
    rows: int = ROWS
    length: int = LENGTH


def compare(
    engine: Engine, checkpoint: Checkpoint, text: ComparisonText, progress: Progress,
    *, tolerance: float | None = None, threads: int = 0,
) -> Comparison:  # fmt: skip
    """Runs both on the same tokens.

    The model is the builder's graph in float32, by the reference bodies of its operators and without any pass, a few
    layers at a time; the engine is its own graph with its own kernels.

    Args:
        tolerance: relative RMS beyond which a place diverges; by default what rounding explains (`_tolerances`).

    Raises:
        UnsupportedModelError: an encoder, or an engine of another target than onnxruntime.
        BadInputError: an engine of another model.
        UsageError: prompts that do not fit, a stripped engine.
    """
    refuse_stripped(engine)
    if engine.config["model"]["kind"] != "decoder" or engine.target != "onnxruntime":
        kind = "an encoder" if engine.target == "onnxruntime" else f"a {engine.target} engine"
        raise UnsupportedModelError(
            f"{engine.path} is {kind}", "decoders of the onnxruntime target are compared layer by layer"
        )
    rows = _rows(engine, checkpoint, text)
    network = _network(engine, checkpoint, max(map(len, rows)))
    progress.stage("running the engine")
    found = EngineTaps(engine, threads=threads or None).read(rows)
    allowed = _tolerances(engine, checkpoint, progress) if tolerance is None else None
    places: list[PlaceError] = []
    logits = None
    for tap in reference_taps(network, RecipeReader(checkpoint.tensors), rows, progress, threads=threads):
        if tap.name == LOGITS:
            logits = tap
        elif tap.name in found:
            limit = tolerance if allowed is None else allowed.at(len(places))
            layer = layer_of(places[-1].name) if places else None
            places.append(_place_error(tap, found.pop(tap.name), layer, limit or 0.0))
    assert logits is not None
    return Comparison(
        str(engine.path), checkpoint.source, len(rows), sum(map(len, rows)),
        *_logit_errors(logits, found[LOGITS]), tuple(places),
    )  # fmt: skip


def _network(engine: Engine, checkpoint: Checkpoint, length: int) -> Network:
    build = engine_build(engine).model_copy(update={"max_seq_len": length, "max_input_len": length})
    network = builder_for(checkpoint)(ModelBuilder(checkpoint, build, DType.FLOAT32))
    model = engine.config["model"]
    for key in ("architecture", "vocab_size", "hidden_size", "num_layers"):
        if model[key] != getattr(network.info, key):
            raise BadInputError(
                f"{engine.path} has {key} {model[key]}, {checkpoint.source} has {getattr(network.info, key)}",
                "compare with the model that the engine was built from",
            )
    return network


def _rows(engine: Engine, checkpoint: Checkpoint, text: ComparisonText) -> list[np.ndarray]:
    limit = int(engine.config["build_config"]["max_input_len"])
    if not text.prompts:
        return list(calibration_tokens(checkpoint, text.dataset, text.rows, min(text.length, limit)))
    rows = [_encoded(checkpoint, prompt) for prompt in text.prompts]
    for prompt, row in zip(text.prompts, rows, strict=True):
        if not 1 <= len(row) <= limit:
            raise UsageError(
                f"the prompt '{prompt[:40]}' has {len(row)} tokens, the engine takes 1 to {limit}", "choose another"
            )
    return rows


def _encoded(checkpoint: Checkpoint, prompt: str) -> np.ndarray:
    import tokenizers

    content = checkpoint.assets.get("tokenizer.json")
    if content is None:
        raise UsageError(f"{checkpoint.source} has no tokenizer", "give the published model, which has one")
    data = content if isinstance(content, bytes) else Path(content).read_bytes()
    return np.asarray(tokenizers.Tokenizer.from_str(data.decode("utf-8")).encode(prompt).ids, np.int64)


def _place_error(expected: Tap, found: Tap, layer: int | None, tolerance: float) -> PlaceError:
    squares, energy, largest = 0.0, 0.0, 0.0
    for left, right in zip(expected.rows, found.rows, strict=True):
        error = right.astype(np.float64) - left
        squares += float(np.square(error).sum())
        energy += float(np.square(left, dtype=np.float64).sum())
        largest = max(largest, float(np.abs(error).max())) if np.isfinite(error).all() else math.inf
    relative = math.sqrt(squares / energy) if energy and math.isfinite(squares) else (0.0 if squares == 0 else math.inf)
    return PlaceError(expected.name, layer, relative, largest, tolerance)


def _logit_errors(expected: Tap, found: Tap) -> tuple[int, float, float, float]:
    """Compared tokens, divergence, agreement, largest error. An engine may give those of each row's last token only."""
    count, divergence, agreed, largest = 0, 0.0, 0, 0.0
    for full, own in zip(expected.rows, found.rows, strict=True):
        wanted = full[-len(own) :]
        p, q = log_softmax(wanted), log_softmax(own)
        divergence += float(np.einsum("nv,nv->", np.exp(p), p - q, dtype=np.float64))
        agreed += int(np.count_nonzero(p.argmax(-1) == q.argmax(-1)))
        largest = max(largest, float(np.abs(wanted - own).max()))
        count += len(own)
    return count, max(0.0, divergence / count), agreed / count, largest


@dataclass(frozen=True)
class _Tolerances:
    """What rounding explains of the error at a place that `sublayers` sublayers lead to.

    The errors of sublayers are independent and add like a walk. A sublayer's is that of two products in a row, each
    with the weights' relative error and, where the kernel rounds them, that of its activations; sums of `terms` terms
    in another order differ by the type's epsilon times the root of their number.
    """

    weights: float
    activations: float
    epsilon: float
    terms: int

    def at(self, sublayers: int) -> float:
        each = 2 * math.hypot(self.weights, self.activations)
        return each * math.sqrt(sublayers + 1) + self.epsilon * math.sqrt(2 * self.terms * (sublayers + 1))


def _tolerances(engine: Engine, checkpoint: Checkpoint, progress: Progress) -> _Tolerances:
    epsilon = _EPSILON[_cache_type(engine)]
    terms = int(engine.config["model"]["hidden_size"])
    types = {entry.dtype for entry in engine.manifest.weights}
    narrow = 2.0**-11 if "float16" in types else 2.0**-8 if "bfloat16" in types else 0.0
    measured = quantization_errors(engine, checkpoint, progress)
    if not (measured.weights or measured.unknown):
        return _Tolerances(narrow, 0.0, epsilon, terms)
    worst: Sequence[float] = [*measured.by_layer.values(), *([_UNMEASURED] if measured.unknown else []), narrow]
    return _Tolerances(max(worst), _ROUNDED_ACTIVATIONS, epsilon, terms)


def _cache_type(engine: Engine) -> str:
    """The type of keys and values: what the graph computes in, but where the cache is quantized."""
    types = [item["dtype"] for item in engine.config["io"]["inputs"] if item["name"].startswith("past_key")]
    return types[0] if types and types[0] in _EPSILON else "FLOAT"
