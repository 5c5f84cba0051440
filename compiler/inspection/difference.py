"""How two checkpoints or two engines differ: configuration, files, and tensor by tensor, a few rows at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint, FunctionTensor, LazyTensor, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.pruned import is_pruned_tensor, pruned_hashes
from trtllm.checkpoints.recipes import Recipe, Source, Stored
from trtllm.compiler.engine import CONFIG, ENGINE, MANIFEST, RECIPES, WEIGHTS, Engine, open_engine
from trtllm.compiler.inspection.payloads import engine_tensors, floats, matrices, payload_hash, row_chunks
from trtllm.compiler.inspection.quantization_error import full_precision
from trtllm.compiler.refit.recipes import stored_recipes
from trtllm.compiler.refit.refit import HISTORY
from trtllm.dtypes import DType
from trtllm.progress import Progress

_ABOUT_THE_BUILD = ("source", "notes")
_OWN_FILES = (CONFIG, ENGINE, RECIPES, WEIGHTS, HISTORY)


@dataclass(frozen=True)
class ValueDifference:
    """A key whose values differ; None where it is absent."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same in both."""

    name: str
    what: str
    """"only in A", "only in B", "shape", "dtype" or "values"; "unknown" when one of them holds no payload."""
    a: str
    """Type and shape, empty where it is absent."""
    b: str
    max_error: float | None = None
    """The largest |a - b|; None where shapes differ or a payload is absent."""
    relative_rms: float | None = None
    """Root mean square of a - b, divided by that of a; infinite when a is all zeros."""


@dataclass(frozen=True)
class Difference:
    """Everything in which B differs from A."""

    kind: str
    """"engine", "checkpoint", or "engine and checkpoint"."""
    a: str
    b: str
    config: tuple[ValueDifference, ...]
    files: tuple[ValueDifference, ...]
    """Files beside the weights, as sha256."""
    tensors: tuple[TensorDifference, ...]
    equal_tensors: int

    @property
    def is_equal(self) -> bool:
        return not (self.config or self.files or self.tensors)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; an infinite error is the string "inf"."""
        tensors = [{key: _finite(value) for key, value in asdict(item).items()} for item in self.tensors]
        return {"equal": self.is_equal, **asdict(self), "tensors": tensors}


def _finite(value: Any) -> Any:
    return "inf" if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two, reduced to what is compared."""

    kind: str
    source: str
    config: Mapping[str, Any]
    files: Mapping[str, str]
    specs: Mapping[str, TensorSpec]
    hashes: Mapping[str, str]
    """Of the stored payloads, where they are known without reading; an empty one is unknown."""
    tensors: Mapping[str, LazyTensor]
    dense: Mapping[str, LazyTensor]
    """Quantized matrices as float32."""


def is_engine(path: str | Path) -> bool:
    """Whether a path is an engine directory, however damaged."""
    return (Path(path) / MANIFEST).is_file()


def difference(a: str, b: str, progress: Progress) -> Difference:
    """Compares what two paths (or hub ids) name. Memory holds a few rows of two tensors.

    An engine and a checkpoint are compared in the engine's weights: those that it holds, and those that its recipes
    make of the checkpoint. Raises whatever opening them raises.
    """
    if is_engine(a) != is_engine(b):
        left, right = _mixed_sides(a, b, progress)
    else:
        left, right = _side(a, progress), _side(b, progress)
    names = [*left.specs, *(name for name in right.specs if name not in left.specs)]
    progress.stage("comparing tensors", len(names))
    found = []
    for name in names:
        found.append(_tensor_difference(name, left, right))
        progress.advance(1)
    different = tuple(item for item in found if item is not None)
    kind = left.kind if left.kind == right.kind else "engine and checkpoint"
    return Difference(
        kind, left.source, right.source, _values(left.config, right.config), _values(left.files, right.files),
        different, len(names) - len(different),
    )  # fmt: skip


def _side(path: str, progress: Progress) -> _Side:
    if is_engine(path):
        return _engine_side(open_engine(path, verify=False))
    from trtllm.frontends.detect import open_model

    return _checkpoint_side(open_model(path, notify=progress.note))


def _mixed_sides(a: str, b: str, progress: Progress) -> tuple[_Side, _Side]:
    from trtllm.frontends.detect import open_model

    engine = open_engine(a if is_engine(a) else b, verify=False)
    checkpoint = open_model(b if is_engine(a) else a, notify=progress.note)
    held, made = _engine_side(engine), _recipe_side(engine, checkpoint)
    config = flattened(engine.config.get("pretrained_config", {}))
    files = {name: digest for name, digest in held.files.items() if name in made.files}
    missing = {name: digest for name, digest in made.files.items() if name not in held.files}
    held = replace(held, config=config, files={**files, **dict.fromkeys(missing, "")})
    return (held, made) if is_engine(a) else (made, held)


def _recipe_side(engine: Engine, checkpoint: Checkpoint) -> _Side:
    """The engine's weights as its recipes make them of a checkpoint; those that it cannot make are absent."""
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_pruned_tensor(tensor)}
    reader = RecipeReader(tensors)
    made: dict[str, LazyTensor] = {}
    dense: dict[str, LazyTensor] = {}
    specs: dict[str, TensorSpec] = {}
    entries = {entry.name: entry for entry in engine.manifest.weights}
    for name, recipe in stored_recipes(engine).items():
        if not _fits(recipe, tensors):
            continue
        specs[name] = TensorSpec(name, entries[name].shape, DType.of(entries[name].dtype))
        full = full_precision(recipe, tensors)
        if full is not None and _fits(full, tensors):
            dense[name] = _of_recipe(reader, full, TensorSpec(name, full.shape, full.dtype))
        if not _is_calibrated(recipe):
            made[name] = _of_recipe(reader, recipe, specs[name])
    return replace(_checkpoint_side(checkpoint), specs=specs, hashes={}, tensors=made, dense=dense)


def _fits(recipe: Recipe, tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the checkpoint has all that a recipe reads of it, in the shapes that it wants."""
    if isinstance(recipe, Stored):
        return True
    if isinstance(recipe, Source):
        return recipe.name in tensors and tensors[recipe.name].spec.shape == recipe.source_shape
    return all(_fits(operand, tensors) for operand in recipe.operands)


def _is_calibrated(recipe: Recipe) -> bool:
    """Whether calibration made a part of it, which the checkpoint does not hold."""
    return isinstance(recipe, Stored) or any(map(_is_calibrated, recipe.operands))


def _of_recipe(reader: RecipeReader, recipe: Recipe, spec: TensorSpec) -> LazyTensor:
    return FunctionTensor(spec, lambda start, stop: reader.rows(recipe, start, stop))


def _engine_side(engine: Engine) -> _Side:
    manifest = engine.manifest
    config = {key: value for key, value in engine.config.items() if key not in _ABOUT_THE_BUILD}
    about = {
        "network_hash": manifest.network_hash, "toolchain_version": manifest.toolchain_version,
        "stripped": list(manifest.stripped), "target": asdict(manifest.target),
    }  # fmt: skip
    tensors = engine_tensors(engine)
    return _Side(
        "engine", str(engine.path), flattened({**config, **about}),
        {name: entry.sha256 for name, entry in manifest.files.items() if name not in _OWN_FILES},
        {entry.name: TensorSpec(entry.name, entry.shape, DType.of(entry.dtype)) for entry in manifest.weights},
        {entry.name: entry.sha256 for entry in manifest.weights}, tensors, matrices(tensors, stored_recipes(engine)),
    )  # fmt: skip


def _checkpoint_side(checkpoint: Checkpoint) -> _Side:
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_pruned_tensor(tensor)}
    return _Side(
        "checkpoint", checkpoint.source, flattened({**checkpoint.config, "architecture": checkpoint.architecture}),
        {name: _content_hash(content) for name, content in checkpoint.assets.items()},
        {name: tensor.spec for name, tensor in checkpoint.tensors.items()}, pruned_hashes(checkpoint.tensors),
        tensors, {},
    )  # fmt: skip


def _content_hash(content: bytes | Path) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else Path(content).read_bytes()).hexdigest()


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _values(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[ValueDifference, ...]:
    keys: Iterable[str] = sorted(a.keys() | b.keys())
    return tuple(
        ValueDifference(key, a.get(key), b.get(key))
        for key in keys
        if json.dumps(a.get(key), default=str) != json.dumps(b.get(key), default=str)
    )


def _tensor_difference(name: str, a: _Side, b: _Side) -> TensorDifference | None:
    left, right = a.specs.get(name), b.specs.get(name)
    if left is None or right is None:
        what = "only in B" if left is None else "only in A"
        return TensorDifference(name, what, _spelled(left), _spelled(right))
    spelled = (_spelled(left), _spelled(right))
    if left.shape != right.shape:
        return TensorDifference(name, "shape", *spelled)
    hashes = (a.hashes.get(name), b.hashes.get(name))
    if left.dtype is right.dtype and hashes[0] and hashes[0] == hashes[1]:
        return None
    is_held = name in a.tensors and name in b.tensors
    if not is_held:
        missing = a if name not in a.tensors else b
        held = (b if missing is a else a).tensors.get(name)
        if held is not None and missing.hashes.get(name) == payload_hash(held) and left.dtype is right.dtype:
            return None
        what = "values" if all(hashes) else "unknown"
        return TensorDifference(name, "dtype" if left.dtype is not right.dtype else what, *spelled)
    if left.dtype is right.dtype and not all(hashes) and _same_bytes(a.tensors[name], b.tensors[name]):
        return None
    pair = (a.dense[name], b.dense[name]) if name in a.dense and name in b.dense else (a.tensors[name], b.tensors[name])
    what = "values" if left.dtype is right.dtype else "dtype"
    return TensorDifference(name, what, *spelled, *error_norms(*pair))


def _spelled(spec: TensorSpec | None) -> str:
    return str(spec).removeprefix(f"{spec.name} ") if spec is not None else ""


def _same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    return all(a.read(*rows).tobytes() == b.read(*rows).tobytes() for rows in row_chunks(a))


def error_norms(a: LazyTensor, b: LazyTensor) -> tuple[float, float]:
    """Largest |a - b|, and the root mean square of a - b relative to that of a, in float64, a few rows at a time.

    Both are infinite when some a - b is not finite.
    """
    largest, squares, energy = 0.0, 0.0, 0.0
    for start, stop in row_chunks(a):
        left = floats(a, start, stop)
        with np.errstate(invalid="ignore"):  # infinity less infinity
            error = floats(b, start, stop) - left
        if not np.isfinite(error).all():
            return math.inf, math.inf
        if error.size:
            largest = max(largest, float(np.abs(error).max()))
            squares, energy = squares + float(error @ error), energy + float(left @ left)
    if squares == 0:
        return largest, 0.0
    return largest, math.sqrt(squares / energy) if energy else math.inf
