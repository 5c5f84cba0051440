"""The recipes that an engine keeps, and how they are turned to a checkpoint whose tensors have other element types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.checkpoints.recipes import Cast, Recipe, Source, recipe_from_json
from trtllm.compiler.engine import RECIPES, Engine
from trtllm.errors import BadInputError

CALIBRATED_STEP = "stored"
"""The step of a source that calibration made: it belongs to the weights that were calibrated, and to no others."""
MEASURED_STEP = "constants"
"""The step of what calibration measured: a vector in the recipe itself, which other weights can be made with too."""
_SEES_PUBLISHED = frozenset({
    "quantized_values", "quantized_scales", "kept_values", "kept_scales", "kept_offsets", "asymmetric_values",
    "asymmetric_scales", "asymmetric_minima", "block_scales", "power_scales", "row_scales", "scaled_by", "rounded_by",
})  # fmt: skip
"""Quantizing steps: they read what the checkpoint holds, in whatever floating type, and their own type is fixed."""
_PASSES_TYPE = frozenset({"transpose", "reshape", "slice", "channel_scaled"})


def stored_recipes(engine: Engine) -> dict[str, Recipe]:
    """The recipe of each of the engine's weights. Raises BadInputError when recipes.json does not say them all."""
    path = engine.path / RECIPES
    try:
        recipes = {name: recipe_from_json(data) for name, data in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInputError(f"{path} cannot be read: {error}", "rebuild the engine") from None
    missing = [entry.name for entry in engine.manifest.weights if entry.name not in recipes]
    if missing:
        raise BadInputError(f"{path} has no recipe of {', '.join(missing[:5])}", "rebuild the engine")
    return recipes


def is_calibrated(recipe: Recipe) -> bool:
    """Whether it reads what calibration made."""
    return recipe.step == CALIBRATED_STEP or any(map(is_calibrated, recipe.operands))


def is_measured(recipe: Recipe) -> bool:
    """Whether it holds what calibration measured."""
    return recipe.step == MEASURED_STEP or any(map(is_measured, recipe.operands))


def source_specs(recipes: Mapping[str, Recipe]) -> dict[str, Source]:
    """Every checkpoint tensor that the recipes read, by name; what calibration made is not among them."""
    found: dict[str, Source] = {}

    def visit(recipe: Recipe) -> None:
        if isinstance(recipe, Source) and recipe.step != CALIBRATED_STEP:
            found.setdefault(recipe.name, recipe)
        for operand in recipe.operands:
            visit(operand)

    for recipe in recipes.values():
        visit(recipe)
    return found


def rebound(recipe: Recipe, tensors: Mapping[str, LazyTensor]) -> Recipe:
    """The recipe as a build of a checkpoint with these tensors makes it, where their element types differ.

    Cast(Source(w bfloat16), float32)       becomes     Source(w float32)
    Source(w float16)                       becomes     Cast(Source(w float32), float16)

    A quantization then sees the published values, as it does in a fresh build.
    """
    if isinstance(recipe, Cast):
        inner = _published(recipe.of, tensors)
        return inner if inner.dtype is recipe.to else Cast(inner, recipe.to)
    if recipe.step in _SEES_PUBLISHED:
        return _with_operands(recipe, tensors, _published)
    if isinstance(recipe, Source):
        published = _published(recipe, tensors)
        return published if published.dtype is recipe.dtype else Cast(published, recipe.dtype)
    return _with_operands(recipe, tensors, rebound)


def _published(recipe: Recipe, tensors: Mapping[str, LazyTensor]) -> Recipe:
    """In the element type of the checkpoint, where only concatenations and the like stand above the sources."""
    if isinstance(recipe, Source):
        tensor = tensors.get(recipe.name)
        if recipe.step == CALIBRATED_STEP or tensor is None:
            return recipe
        return replace(recipe, source_dtype=tensor.spec.dtype)
    if recipe.step in ("concat", "stack"):
        parts = _with_operands(recipe, tensors, _published)
        return parts if len({part.dtype for part in parts.operands}) == 1 else _with_operands(recipe, tensors, rebound)
    if recipe.step in _PASSES_TYPE:
        return _with_operands(recipe, tensors, _published)
    return rebound(recipe, tensors)


def _with_operands(recipe: Recipe, tensors: Mapping[str, LazyTensor], change: Any) -> Recipe:
    changed: dict[str, Any] = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if isinstance(value, Recipe):
            changed[field.name] = change(value, tensors)
        elif isinstance(value, tuple) and value and all(isinstance(item, Recipe) for item in value):
            changed[field.name] = tuple(change(item, tensors) for item in value)
    return replace(recipe, **changed) if changed else recipe
