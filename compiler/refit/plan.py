"""Refit of engines whose file holds the weights itself.

Where the plan's library and a GPU are, the library's own refitter puts the weights that change into a plan that was
built to take them. Elsewhere the plan is built again from the network that the engine keeps, and a note says why.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Recipe
from trtllm.compiler.engine import ENGINE, Engine, EngineWriter, Manifest
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.text import from_bytes
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.targets.table import target_of
from trtllm.compiler.targets.tensorrt.emit import NETWORK
from trtllm.compiler.targets.tensorrt.library import Library, load
from trtllm.compiler.targets.tensorrt.package import attach_weights, model_info
from trtllm.compiler.targets.tensorrt.payloads import stored_weights
from trtllm.compiler.targets.tensorrt.refit import Payload, refit_plan
from trtllm.compiler.targets.tensorrt.timing_cache import device_name
from trtllm.compiler.targets.tensorrt.versions import FULL_NAME
from trtllm.config import BuildConfig, build_config
from trtllm.errors import BadInputError, TargetError, UnsupportedModelError
from trtllm.progress import Progress


def renew_plan(
    engine: Engine,
    recipes: Mapping[str, Recipe],
    changed: Collection[str],
    reader: RecipeReader,
    writer: EngineWriter,
    progress: Progress,
) -> Manifest:
    """Writes the plan with the weights `changed` made by their recipes; returns the manifest without its files."""
    build = build_config(engine.config["build_config"])
    library = _refitting_library(engine, build)
    reason = library
    if isinstance(library, Library):
        made = _refitted(library, engine, recipes, changed, reader, writer, progress)
        if isinstance(made, Manifest):
            progress.note(f"TensorRT put {len(changed)} weights into the plan, which was not built again")
            return made
        reason = made
    _check_whole(recipes, reader, str(reason))
    progress.note(f"the plan is built again from the network that the engine keeps: {reason}")
    return rebuild_plan(engine, recipes, reader, writer, progress)


def _check_whole(recipes: Mapping[str, Recipe], reader: RecipeReader, reason: str) -> None:
    """Raises BadInputError when weights that do not change could not be made again."""
    known = set(reader.source_names)
    missing = sorted({name for recipe in recipes.values() for name in recipe.sources()} - known)
    if missing:
        listed = ", ".join(missing[:3])
        raise BadInputError(
            f"the plan must be built again ({reason}), and {len(missing)} tensors are not given: {listed}",
            "give a complete checkpoint, or the rest by --base",
        )


def _refitting_library(engine: Engine, build: BuildConfig) -> Library | str:
    """The library that refits the engine's plan here, or why none does."""
    target = engine.manifest.target
    if target.flavour != FULL_NAME:
        return "plans of TensorRT-RTX are built without the flag that refitting needs"
    if not build.refittable:
        return "it was built with --no-refittable"
    if device_name() is None:
        return "a plan is refitted on a GPU only"
    try:
        library = load(version=target.version)
    except TargetError as error:
        return error.what
    if library.version != target.version:
        return f"it is of TensorRT {target.version}, installed is {library.version}"
    return library


def _refitted(
    library: Library,
    engine: Engine,
    recipes: Mapping[str, Recipe],
    changed: Collection[str],
    reader: RecipeReader,
    writer: EngineWriter,
    progress: Progress,
) -> Manifest | str:
    """The manifest of the refitted plan, which is written, or why the library does not take these weights."""
    weights = [Weight(entry.name, recipes[entry.name]) for entry in engine.manifest.weights if entry.name in changed]
    progress.stage("reading weights", sum(weight.recipe.nbytes for weight in weights))
    with stored_weights(writer.folder, weights, reader, progress) as payloads:
        given: Iterable[Payload] = ((weight.name or "", weight.recipe.dtype, payloads.of(weight)) for weight in weights)
        progress.stage("refitting the plan")
        try:
            plan, summary = refit_plan(library, (engine.path / ENGINE).read_bytes(), given)
        except (TargetError, UnsupportedModelError) as error:
            return error.what
        hashes = {entry.name: entry.sha256 for entry in payloads.entries}
    before = {entry.name: entry.sha256 for entry in engine.manifest.weights}
    stale = [name for name in summary.kept if hashes[name] != before[name]]
    if stale:
        return f"the plan does not take {', '.join(stale[:3])} by name"
    writer.write_bytes(ENGINE, plan)
    renewed = tuple(replace(entry, sha256=hashes.get(entry.name, entry.sha256)) for entry in engine.manifest.weights)
    return replace(engine.manifest, weights=renewed, stripped=(), stripped_sources={})


def rebuild_plan(
    engine: Engine, recipes: Mapping[str, Recipe], reader: RecipeReader, writer: EngineWriter, progress: Progress
) -> Manifest:
    """Writes the plan anew with weights of the recipes; returns the manifest without its files.

    Raises UnsupportedModelError for an engine that keeps no network, TargetError when the library refuses.
    """
    path = engine.path / NETWORK
    if not path.is_file():
        raise UnsupportedModelError(
            f"{engine.path} is a {engine.target} plan that was built without keeping its network",
            "build it again: engines of this version keep the network, from which a refit makes the plan",
        )
    network = Network(from_bytes(path.read_bytes()), model_info(engine))
    attach_weights(network, recipes)
    build = build_config(engine.config["build_config"])
    emitted = target_of(build).emit(network, build, reader, writer, progress)
    return replace(
        engine.manifest, target=emitted.target, weights=tuple(emitted.weights), stripped=(), stripped_sources={}
    )
