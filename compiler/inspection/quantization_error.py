"""What rounding cost an engine's weights: its recipes in full precision against the matrices that they became."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint, FunctionTensor, LazyTensor, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import (
    AsymmetricValues,
    Cast,
    Concat,
    KeptValues,
    QuantizedValues,
    Recipe,
    Reshape,
    Source,
    Stored,
    TiledScales,
    TiledValues,
    UnsignedBlocks,
)
from trtllm.checkpoints.scaled_recipes import BlockScales, LaneTiles, RoundedBy
from trtllm.compiler.engine import Engine
from trtllm.compiler.inspection.graph import layer_of
from trtllm.compiler.inspection.payloads import engine_tensors, floats, matrices, row_chunks
from trtllm.compiler.refit.recipes import stored_recipes
from trtllm.dtypes import DType
from trtllm.errors import BadInputError
from trtllm.progress import Progress

_ROUNDING = ("quantized_values", "kept_values", "asymmetric_values", "rounded_by")
_CALIBRATED = (".quantized_values", ".counted_values")


@dataclass(frozen=True)
class WeightError:
    """How far a weight is from what its recipe makes in full precision."""

    name: str
    layer: int | None
    relative_rms: float
    """Root mean square of the error over that of the weight."""
    max_error: float
    elements: int
    energy: float
    """Sum of the squares of the weight."""


@dataclass(frozen=True)
class QuantizationErrors:
    """The errors of every quantized weight that can be read back."""

    reference: str
    weights: tuple[WeightError, ...]
    unknown: tuple[str, ...]
    """Quantized weights whose full-precision form the recipes do not tell, or whose layout is not read back."""

    @property
    def by_layer(self) -> dict[str, float]:
        """Relative RMS over all quantized weights of a layer; the head and the like are under "outside"."""
        squares: dict[str, float] = {}
        energies: dict[str, float] = {}
        for item in self.weights:
            key = "outside" if item.layer is None else str(item.layer)
            squares[key] = squares.get(key, 0.0) + item.relative_rms**2 * item.energy
            energies[key] = energies.get(key, 0.0) + item.energy
        return {key: math.sqrt(squares[key] / energies[key]) if energies[key] else 0.0 for key in squares}

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self.reference,
            "by_layer": self.by_layer,
            "weights": [
                {"name": item.name, "relative_rms": item.relative_rms, "max_error": item.max_error}
                for item in self.weights
            ],
            "unknown": list(self.unknown),
        }


def quantization_errors(engine: Engine, reference: Checkpoint, progress: Progress) -> QuantizationErrors:
    """Compares the engine's quantized matrices with the reference's, rows at a time.

    Raises BadInputError when the reference is of another model.
    """
    recipes, tensors = stored_recipes(engine), engine_tensors(engine)
    dense = matrices(tensors, recipes)
    reader = RecipeReader(reference.tensors)
    quantized = [entry.name for entry in engine.manifest.weights if quantizing_step(recipes[entry.name])]
    progress.stage("measuring quantization", len(quantized))
    found, unknown = [], []
    for name in quantized:
        full = full_precision(recipes[name], reference.tensors)
        if name in dense and full is not None:
            found.append(_error(name, dense[name], _evaluated(reader, full)))
        else:
            unknown.append(name)
        progress.advance(1)
    return QuantizationErrors(reference.source, tuple(found), tuple(unknown))


def quantizing_step(recipe: Recipe) -> str | None:
    """The step that makes integers or small floats of a weight; None for scales and for weights in full precision."""
    if isinstance(recipe, RoundedBy) and isinstance(recipe.of, BlockScales):
        return None
    if recipe.step in _ROUNDING or (isinstance(recipe, Stored) and recipe.name.endswith(_CALIBRATED)):
        return recipe.step
    if isinstance(recipe, TiledScales) or not recipe.operands:
        return None
    return next(filter(None, map(quantizing_step, recipe.operands)), None)


def full_precision(recipe: Recipe, tensors: Mapping[str, LazyTensor]) -> Recipe | None:
    """What a weight is before it is rounded: the operand of its quantization, in float32.

    TiledValues(QuantizedValues(x, bits=4))     becomes     x
    TiledValues(KeptValues(w))                  becomes     w, dequantized
    LaneTiles(RoundedBy(w * s, scales))         becomes     w * s, as smoothed
    TiledValues(Stored("w.quantized_values"))   becomes     w of the checkpoint

    None when the recipe does not tell.
    """
    if isinstance(recipe, TiledValues | UnsignedBlocks | LaneTiles):
        return full_precision(recipe.of, tensors)
    if isinstance(recipe, Reshape) and isinstance(recipe.of, UnsignedBlocks):  # of experts
        return full_precision(recipe.of, tensors)
    if isinstance(recipe, QuantizedValues | KeptValues | AsymmetricValues | RoundedBy):
        return Cast(recipe.of, DType.FLOAT32)
    if isinstance(recipe, Stored):
        tensor = tensors.get(recipe.name.rpartition(".")[0])
        return Cast(Source.of(tensor.spec), DType.FLOAT32) if tensor is not None else None
    if not isinstance(recipe, Concat):
        return None
    parts = [full_precision(part, tensors) for part in recipe.parts]
    known = tuple(part for part in parts if part is not None)
    return Concat(known, recipe.axis) if len(known) == len(parts) else None


def _evaluated(reader: RecipeReader, recipe: Recipe) -> LazyTensor:
    return FunctionTensor(TensorSpec("", recipe.shape, recipe.dtype), lambda a, b: reader.rows(recipe, a, b))


def _error(name: str, made: LazyTensor, full: LazyTensor) -> WeightError:
    if made.spec.shape != full.spec.shape:
        raise BadInputError(
            f"{name} stands for a matrix of {made.spec.shape}, the reference has {full.spec.shape}",
            "give the model that the engine was built from",
        )
    squares, energy, largest = 0.0, 0.0, 0.0
    for start, stop in row_chunks(made):
        expected = floats(full, start, stop)
        error = floats(made, start, stop) - expected
        squares, energy = squares + float(error @ error), energy + float(expected @ expected)
        largest = max(largest, float(np.abs(error).max(initial=0.0)))
    relative = math.sqrt(squares / energy) if energy else (0.0 if squares == 0 else math.inf)
    return WeightError(name, layer_of(name), relative, largest, made.spec.elements, energy)
