"""Refit: examine what is given, write the engine with its weights made anew, verify it, let it appear in one step."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Recipe, recipe_from_json
from trtllm.compiler.calibration.kept import FILES as CALIBRATION_FILES
from trtllm.compiler.calibration.kept import kept_tokens, write_calibration
from trtllm.compiler.compiled import Compiled
from trtllm.compiler.engine import (
    CONFIG,
    ENGINE,
    MANIFEST,
    RECIPES,
    WEIGHTS,
    Engine,
    EngineWriter,
    Manifest,
    WeightEntry,
    check_free,
    open_engine,
    writing,
)
from trtllm.compiler.pipeline import calibrated, compile_network, engine_config
from trtllm.compiler.refit.given import Given, open_given
from trtllm.compiler.refit.preflight import differing_config, examine
from trtllm.compiler.refit.recipes import is_calibrated, is_measured, rebound, stored_recipes
from trtllm.compiler.refit.report import RefitReport, listed
from trtllm.compiler.refit.tokenizers import TOKENIZER, tokenizer_difference
from trtllm.compiler.refit.verification import Verification, verify_against, verify_finite
from trtllm.compiler.stripping import EnginePayloads
from trtllm.compiler.targets.weights_file import Piece, write_pieces
from trtllm.config import BuildConfig, build_config
from trtllm.errors import BadInputError, TrtllmError, UsageError
from trtllm.progress import Progress, Silent

HISTORY = "refit.json"
"""Where an engine's weights come from, and what a revert needs: the hashes and recipes it was built with."""
_EXCHANGE = 2
_AT_FDCWD = -100


@dataclass(frozen=True)
class RefitOptions:
    """How a refit is done.

    `base` is the model that an adapter or some tensors belong to; `strength` scales an adapter; `partial` takes a
    checkpoint that lacks tensors; `revert` puts the original weights back, from `base`; `recalibrate` runs the
    calibration of a calibrated scheme on the new weights.
    """

    base: Any = None
    strength: float = 1.0
    partial: bool = False
    revert: bool = False
    recalibrate: bool = False
    verify: bool = True
    threads: int = 0
    keeps_tokenizer: bool = False
    """A running model goes on with the tokenizer that it has; one whose tokens have other numbers is refused."""


@dataclass(frozen=True, eq=False)
class PreparedRefit:
    """A refit that only needs to be written."""

    engine: Engine
    given: Given
    report: RefitReport
    recipes: Mapping[str, Recipe]
    """Of every weight, as they will stand in the new engine."""
    reader: RecipeReader
    compiled: Compiled | None
    """The checkpoint lowered afresh, where that was needed."""
    options: RefitOptions
    keeps_history: bool = True
    """Whether the new engine says where its weights come from, and can be reverted."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """An engine with other weights."""

    engine: Engine
    report: RefitReport
    verification: Verification | None


def refit_engine(
    engine: Engine | str | Path,
    model: Any,
    output_dir: str | Path | None = None,
    *,
    options: RefitOptions | None = None,
    in_place: bool = False,
    progress: Progress | None = None,
) -> Refitted:
    """Writes `engine` with the weights of `model` to `output_dir`, by default `<engine>.refit`.

    Args:
        model: what a build takes, tensors by their Hugging Face names, a safetensors file, or a PEFT adapter directory.
        in_place: exchange the engine's directory for the new one in one step instead.

    Raises:
        BadInputError: that says everything that does not fit, before anything is written.
        UsageError: the output exists.
    """
    opened = engine if isinstance(engine, Engine) else open_engine(engine, verify=False)
    target = opened.path if in_place else Path(output_dir or f"{opened.path}.refit")
    if not in_place:
        check_free(target.absolute())
    prepared = prepare_refit(opened, model, options=options, progress=progress)
    prepared.report.check()
    return finish_refit(prepared, target, in_place=in_place, progress=progress)


def prepare_refit(
    engine: Engine, model: Any, *, options: RefitOptions | None = None, progress: Progress | None = None
) -> PreparedRefit:
    """Everything but the writing; what does not fit stands in the report."""
    options, progress = options or RefitOptions(), progress or Silent()
    progress.stage("reading the new weights")
    recipes = stored_recipes(engine)
    if options.revert:
        model, options, recipes = _reverted(engine, model, options, recipes)
    architecture = engine.config["pretrained_config"]["architecture"]
    given = open_given(
        model, architecture, base=options.base if not options.revert else None, strength=options.strength,
        partial=options.partial, known_tokenizer=engine.path / TOKENIZER, progress=progress,
    )  # fmt: skip
    report = examine(engine, recipes, given, recalibrates=options.recalibrate, keeps_tokenizer=options.keeps_tokenizer)
    compiled: Compiled | None = None
    if not report.problems:
        given, compiled, problems = _lowered(engine, given, recipes, options, progress)
        if problems:
            hint = "a model that computes otherwise needs an engine of its own: trtllm-build"
            report = replace(report, problems=tuple(problems), hints=(hint,))
    changed = set(report.changed_weights)
    if compiled is not None:
        fresh = {weight.name or "": weight.recipe for weight in compiled.weights}
        recipes = {
            name: fresh[name] if name in changed else recipe for name, recipe in recipes.items() if name in fresh
        }
    elif not report.problems:
        recipes = {
            name: rebound(recipe, given.tensors) if name in changed else recipe for name, recipe in recipes.items()
        }
    reader = RecipeReader(given.tensors, threads=options.threads)
    return PreparedRefit(engine, given, report, recipes, reader, compiled, options)


def refit_built(engine: Engine, checkpoint: Checkpoint, compiled: Compiled, target: Path, progress: Progress) -> Engine:
    """An engine of a network that is lowered already, from one of the same network with other weights.

    It is what a build makes, but for the order of its weights.
    """
    names = frozenset(checkpoint.tensors)
    given = Given("checkpoint", checkpoint.source, checkpoint.tensors, names, checkpoint, is_complete=True)
    recipes = {weight.name or "": weight.recipe for weight in compiled.weights}
    report = examine(engine, recipes, given, recalibrates=True)
    report.check()
    options = RefitOptions(verify=False)
    reader = RecipeReader(checkpoint.tensors)
    prepared = PreparedRefit(engine, given, report, recipes, reader, compiled, options, keeps_history=False)
    return finish_refit(prepared, target, progress=progress).engine


def _lowered(
    engine: Engine, given: Given, recipes: Mapping[str, Recipe], options: RefitOptions, progress: Progress
) -> tuple[Given, Compiled | None, list[str]]:
    """A fresh lowering where it is needed: to calibrate, or because the configs differ in more than names."""
    checkpoint = given.checkpoint
    if checkpoint is None:
        return given, None, []
    different = differing_config(engine, checkpoint)
    is_chosen = any(is_calibrated(recipe) or is_measured(recipe) for recipe in recipes.values())
    wants = options.recalibrate and is_chosen
    if different and is_chosen and not wants:
        return given, None, [f"config.json differs in {listed(different)}, and only --recalibrate builds its graph"]
    if not different and not wants:
        return given, None, []
    try:
        checkpoint, compiled = lowered(engine, checkpoint, progress, calibrates=wants, threads=options.threads)
    except TrtllmError as error:
        if not different:
            raise
        return given, None, [f"config.json differs in {listed(different)}, and cannot be built: {error.what}"]
    if compiled.network_hash != engine.manifest.network_hash:
        return given, None, [f"its graph is another one: config.json differs in {listed(different)}"]
    return replace(given, checkpoint=checkpoint, tensors=checkpoint.tensors), compiled if wants else None, []


def lowered(
    engine: Engine, checkpoint: Checkpoint, progress: Progress, *, calibrates: bool, threads: int = 0
) -> tuple[Checkpoint, Compiled]:
    """The checkpoint as a build with the engine's options lowers it, with what calibration made of it."""
    build = engine_build(engine)
    if not calibrates:
        return checkpoint, compile_network(checkpoint, build)
    difference = tokenizer_difference(engine.path / TOKENIZER, checkpoint.assets.get(TOKENIZER))
    # Other tokens than the engine's are made of the text anew.
    tokens = kept_tokens(engine, checkpoint, build) if difference is None else None
    calibration = calibrated(checkpoint, build, progress, tokens=tokens, threads=threads)
    whole = replace(checkpoint, tensors={**checkpoint.tensors, **calibration.tensors})
    return whole, compile_network(whole, build, calibration=calibration)


def engine_build(engine: Engine) -> BuildConfig:
    """The options that the engine was built with."""
    return build_config(engine.config["build_config"])


def finish_refit(
    prepared: PreparedRefit, target: Path, *, in_place: bool = False, progress: Progress | None = None
) -> Refitted:
    """Writes, verifies, and lets the engine appear at `target`, or take the place of the one that is there."""
    progress = progress or Silent()
    target = target.absolute()
    if in_place:
        _sweep(target)
    made = target.with_name(f".{target.name}.refit-{os.getpid()}-{uuid.uuid4().hex[:8]}") if in_place else target
    with writing(made) as writer:
        _write(prepared, writer, progress)
        verification = _verified(prepared, open_engine(writer.folder, verify=False), progress)
    if in_place:
        _exchange(made, target)
        shutil.rmtree(made, ignore_errors=True)
    return Refitted(open_engine(target, verify=False), prepared.report, verification)


def _write(prepared: PreparedRefit, writer: EngineWriter, progress: Progress) -> None:
    engine, given = prepared.engine, prepared.given
    if engine.target == "onnxruntime":
        manifest = _write_weights(prepared, writer, progress)
    else:
        from trtllm.compiler.refit.plan import renew_plan

        changed = set(prepared.report.changed_weights)
        manifest = renew_plan(engine, prepared.recipes, changed, prepared.reader, writer, progress)
    progress.stage("finishing")
    _check_reverted(prepared, manifest)
    replaces = given.kind == "checkpoint" and given.is_complete and given.checkpoint is not None
    assets = {name: content for name, content in given.checkpoint.assets.items() if "/" not in name} if replaces else {}  # type: ignore[union-attr]
    # A fine-tune that was saved without its tokenizer keeps the engine's.
    takes_all = replaces and (not prepared.keeps_history or TOKENIZER in assets)
    kept = {ENGINE, *CALIBRATION_FILES} if takes_all else set(engine.manifest.files)
    if prepared.compiled is not None and prepared.compiled.calibration_tokens is not None:
        write_calibration(writer, prepared.compiled.calibration_tokens, prepared.compiled.build)
        kept -= set(CALIBRATION_FILES)
    kept -= {WEIGHTS, RECIPES, CONFIG, HISTORY, MANIFEST, *assets}
    for name in sorted(kept & engine.manifest.files.keys()):
        if not (writer.folder / name).exists():
            shutil.copyfile(engine.path / name, writer.folder / name)
            writer.file_hashes[name] = engine.manifest.files[name].sha256
    for name, content in assets.items():
        writer.write_bytes(name, content if isinstance(content, bytes) else content.read_bytes())
    writer.write_json(RECIPES, {name: recipe.to_json() for name, recipe in prepared.recipes.items()})
    writer.write_json(CONFIG, _config(prepared, replaces=replaces))
    if not prepared.options.revert and prepared.keeps_history:
        writer.write_json(HISTORY, _history(prepared))
    writer.write_json(MANIFEST, replace(manifest, files=writer.file_entries()).to_json())


def _write_weights(prepared: PreparedRefit, writer: EngineWriter, progress: Progress) -> Manifest:
    """The weights file: what changes by its recipe, the rest as the engine has it."""
    manifest, changed = prepared.engine.manifest, set(prepared.report.changed_weights)
    kept = EnginePayloads(prepared.engine)
    entries = sorted(manifest.weights, key=lambda entry: entry.offset)
    progress.stage("writing weights", sum(entry.nbytes for entry in entries))

    def chunks(entry: WeightEntry) -> Iterator[np.ndarray]:
        if entry.name in changed:
            yield from prepared.reader.chunks(prepared.recipes[entry.name])
        else:
            yield from (np.frombuffer(piece, np.uint8) for piece in kept(entry))

    pieces = (Piece(entry.name, entry.offset, entry.nbytes, chunks(entry)) for entry in entries)
    digests, whole = write_pieces(writer.folder / WEIGHTS, pieces, prepared.reader.chunk_bytes, progress)
    writer.file_hashes[WEIGHTS] = whole
    weights = tuple(replace(entry, sha256=digests[entry.name]) for entry in manifest.weights)
    damaged = [
        new.name for new, old in zip(weights, manifest.weights, strict=True)
        if new.name not in changed and new.sha256 != old.sha256
    ]  # fmt: skip
    if damaged:
        raise BadInputError(
            f"the engine's own weights are damaged: {listed(damaged)}", "give a complete checkpoint, or copy it again"
        )
    return replace(manifest, weights=weights, stripped=(), stripped_sources={})


def _config(prepared: PreparedRefit, *, replaces: bool) -> dict[str, Any]:
    config = dict(prepared.engine.config)
    checkpoint = prepared.given.checkpoint
    if replaces and checkpoint is not None and prepared.compiled is not None:
        return engine_config(checkpoint, prepared.compiled)
    if replaces and checkpoint is not None:
        config["pretrained_config"] = dict(checkpoint.config) | {"architecture": checkpoint.architecture}
        config["source"] = {"format": checkpoint.format, "name": checkpoint.source}
    return config


def _history(prepared: PreparedRefit) -> dict[str, Any]:
    """Keeps what the first refit found; later ones only say where their weights come from."""
    engine = prepared.engine
    known = read_history(engine) or {
        "original": {
            "source": engine.config.get("source"),
            "weights": {entry.name: entry.sha256 for entry in engine.manifest.weights},
            "recipes": json.loads((engine.path / RECIPES).read_text(encoding="utf-8")),
        }
    }
    return {"version": 1, "original": known["original"], "weights_from": prepared.given.identity}


def read_history(engine: Engine) -> dict[str, Any] | None:
    """refit.json; None for an engine whose weights are those it was built with."""
    path = engine.path / HISTORY
    if HISTORY not in engine.manifest.files:
        return None
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data["original"]["weights"], dict) and isinstance(data["original"]["recipes"], dict):
            return data
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise BadInputError(f"{path} cannot be read", "refit from a complete checkpoint instead of reverting")


def _reverted(
    engine: Engine, model: Any, options: RefitOptions, recipes: dict[str, Recipe]
) -> tuple[Any, RefitOptions, dict[str, Recipe]]:
    """The model, options and recipes of a refit that undoes all earlier ones."""
    history = read_history(engine)
    if history is None:
        raise UsageError(f"{engine.path} holds the weights it was built with", "there is nothing to revert")
    base = options.base if options.base is not None else model
    if base is None:
        source = (history["original"].get("source") or {}).get("name")
        raise UsageError("a revert needs the model that the engine was built from", f"--base {source or 'MODEL'}")
    original = {name: recipe_from_json(data) for name, data in history["original"]["recipes"].items()}
    return base, replace(options, base=None), {name: original[name] for name in recipes}


def _check_reverted(prepared: PreparedRefit, manifest: Manifest) -> None:
    if not prepared.options.revert:
        return
    history = read_history(prepared.engine)
    assert history is not None
    hashes = history["original"]["weights"]
    wrong = [entry.name for entry in manifest.weights if hashes.get(entry.name) and hashes[entry.name] != entry.sha256]
    if wrong:
        raise BadInputError(
            f"{prepared.given.source} is not what the engine was built from: {len(wrong)} weights differ: "
            f"{listed(wrong)}",
            "revert with the original model, or refit to this one",
        )


def _verified(prepared: PreparedRefit, engine: Engine, progress: Progress) -> Verification | None:
    if not prepared.options.verify:
        return None
    progress.stage("verifying")
    given, checkpoint = prepared.given, prepared.given.checkpoint
    covers = (
        given.is_complete or given.base is not None or set(prepared.report.changed_weights) == set(prepared.recipes)
    )
    if checkpoint is None or not covers:
        return verify_finite(engine)
    if len(prepared.report.changed_weights) < len(prepared.recipes):
        return verify_finite(engine)
    compiled = prepared.compiled
    if compiled is None and any(map(is_measured, prepared.recipes.values())):
        return verify_finite(engine)
    compiled = compiled or compile_network(checkpoint, engine_build(engine))
    return verify_against(engine, checkpoint, compiled, prepared.recipes, progress, threads=prepared.options.threads)


def _exchange(made: Path, target: Path) -> None:
    """Swaps two directories in one step of the file system, or, where it has none, in two renames."""
    library = ctypes.CDLL(None, use_errno=True)
    swap = getattr(library, "renameat2", None)
    if swap is not None:
        here, there = os.fsencode(made), os.fsencode(target)
        if swap(_AT_FDCWD, here, _AT_FDCWD, there, ctypes.c_uint(_EXCHANGE)) == 0:
            return
    aside = made.with_name(f"{made.name}.old")
    os.rename(target, aside)
    os.rename(made, target)
    os.rename(aside, made)


def _sweep(target: Path) -> None:
    """Removes what killed refits of the same engine left behind."""
    for leftover in (*target.parent.glob(f".{target.name}.refit-*"), *target.parent.glob(f"..{target.name}.refit-*")):
        process = leftover.name.split(".refit-", 1)[1].split("-", 1)[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(leftover, ignore_errors=True)
