"""The whole build as stages: open the model, build its graph, run the passes, emit the engine."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.pruned import pruned_hashes
from trtllm.checkpoints.stored import stored_quantizations
from trtllm.compiler.cache_record import cache_record
from trtllm.compiler.calibration.activation_ranges import activation_ranges, wants_ranges
from trtllm.compiler.calibration.calibrate import Calibration
from trtllm.compiler.calibration.dataset import calibration_tokens
from trtllm.compiler.calibration.for_build import calibrate_build, wants_calibration
from trtllm.compiler.calibration.kept import write_calibration
from trtllm.compiler.compiled import Compiled, PassReport
from trtllm.compiler.engine import CONFIG, MANIFEST, RECIPES, Engine, EngineWriter, Manifest, check_free, open_engine
from trtllm.compiler.engine import writing as writing_engine
from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.compiler.ir.network import ModelInfo, Network
from trtllm.compiler.ir.text import dump, network_hash
from trtllm.compiler.ir.verifier import verify
from trtllm.compiler.levels import LEGALIZE, pipeline
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.sentence_files import published_length
from trtllm.compiler.models.table import builder_for
from trtllm.compiler.operator_plan import operator_plan, places_of
from trtllm.compiler.plan import BuildLimits, BuildPlan, check_plan, plan_compiled
from trtllm.compiler.targets.checks import check_graph, check_options
from trtllm.compiler.targets.table import target_of
from trtllm.config import BuildConfig, build_config
from trtllm.dtypes import DType
from trtllm.errors import UnsupportedModelError, UsageError
from trtllm.passes.base import Pass, PassContext
from trtllm.progress import Progress, Silent

DEFAULT_MAX_SEQ_LEN = 8192
"""Tokens: the longest sequence that is planned for when the user names none and the model takes more."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A build that only needs to be written."""

    checkpoint: Checkpoint
    compiled: Compiled
    plan: BuildPlan
    emits_network: bool = False


def compile(
    model: str | Path | object,
    *,
    output_dir: str | Path | None = None,
    target: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
    dequantize: bool | None = None,
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
    config: BuildConfig | None = None,
    tokenizer: object | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Builds an engine from a model.

    Args:
        model: a path (Hugging Face directory, GGUF file), a hub id, or a transformers model in memory.
        output_dir: where the engine directory goes; it must not exist. Without it the engine lives in a temporary
            folder for as long as the returned object.
        target, dtype, quantization, dequantize, max_batch_size, max_seq_len: the same fields of `config`, which they
            override.
        tokenizer: the tokenizer of a model in memory.
        progress: told of stages and notes.

    Raises:
        TrtllmError: whose class tells what to do: see `trtllm.errors`.
    """
    given = {
        "target": target,
        "dtype": dtype,
        "quantization": quantization,
        "dequantize": dequantize,
        "max_batch_size": max_batch_size,
        "max_seq_len": max_seq_len,
    }
    chosen = {key: value for key, value in given.items() if value is not None}
    build = build_config({**(config.model_dump() if config else {}), **chosen})
    if output_dir is not None:
        return build_engine(model, Path(output_dir), build, tokenizer=tokenizer, progress=progress)
    holder = tempfile.TemporaryDirectory(prefix="trtllm-engine-")
    engine = build_engine(model, Path(holder.name) / "engine", build, tokenizer=tokenizer, progress=progress)
    weakref.finalize(engine, holder.cleanup)
    return engine


def build_engine(
    model: str | Path | object,
    output_dir: Path,
    build: BuildConfig,
    *,
    limits: BuildLimits | None = None,
    tokenizer: object | None = None,
    progress: Progress | None = None,
    dump_dir: Path | None = None,
) -> Engine:
    """Builds the engine directory `output_dir`; see `compile`. Raises ResourceError when it cannot fit `limits`."""
    progress = progress or Silent()
    prepared = prepare_build(
        model, build, output_dir, limits=limits, tokenizer=tokenizer, progress=progress, dump_dir=dump_dir
    )
    return finish_build(prepared, output_dir, limits=limits, progress=progress)


def prepare_build(
    model: str | Path | object,
    build: BuildConfig,
    output_dir: Path,
    *,
    limits: BuildLimits | None = None,
    tokenizer: object | None = None,
    progress: Progress | None = None,
    dump_dir: Path | None = None,
    calibrates: bool = True,
    emits_network: bool = False,
) -> Prepared:
    """Everything of a build but the writing: nothing appears at `output_dir`.

    `emits_network` prepares what another machine builds the engine of, and needs no library of the target here.
    Without `calibrates` it is good for a plan only: weights that calibration would choose are rounded plainly.
    """
    progress = progress or Silent()
    check_free(output_dir.absolute())
    target = target_of(build)
    if calibrates and not emits_network:
        target.library_version(*filter(None, [build.tensorrt_version]))
    if emits_network and target.emit_network is None:
        raise UsageError(f"target {build.target} has no network to emit", "--emit network is for --target tensorrt")
    check_options(build, target.capabilities)  # before calibration, which takes minutes
    compute_dtype(build, target.capabilities, [])
    checkpoint = read_model(model, tokenizer=tokenizer, progress=progress)
    threads = limits.threads if limits is not None else 0
    calibration = calibrated(checkpoint, build, progress, threads=threads) if calibrates else Calibration()
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, **calibration.tensors})
    compiled = compile_network(checkpoint, build, progress=progress, dump_dir=dump_dir, calibration=calibration)
    plan = plan_compiled(checkpoint, compiled, output_dir=output_dir, limits=limits)
    return Prepared(checkpoint, compiled, plan, emits_network=emits_network)


def finish_build(
    prepared: Prepared, output_dir: Path, *, limits: BuildLimits | None = None, progress: Progress | None = None
) -> Engine:
    """Writes what was prepared. Raises ResourceError when its plan says that it does not fit."""
    check_plan(prepared.plan)
    reader = RecipeReader(
        prepared.checkpoint.tensors,
        chunk_bytes=prepared.plan.chunk_bytes,
        threads=limits.threads if limits is not None else 0,
    )
    write_engine(
        prepared.checkpoint, prepared.compiled, output_dir, progress or Silent(), reader,
        emits_network=prepared.emits_network,
    )  # fmt: skip
    return open_engine(output_dir, verify=False)


def plan_build(checkpoint: Checkpoint, build: BuildConfig) -> BuildPlan:
    """What a build of the checkpoint would make and cost on this machine."""
    return plan_compiled(checkpoint, compile_network(checkpoint, build))


def read_model(model: str | Path | object, *, tokenizer: object | None = None, progress: Progress) -> Checkpoint:
    """Opens a model in whatever form it is given, and says what it found."""
    from trtllm.frontends.detect import open_model

    progress.stage("reading the model")
    checkpoint = open_model(model, tokenizer=tokenizer, notify=progress.note)
    return checkpoint


def compile_network(
    checkpoint: Checkpoint,
    build: BuildConfig,
    *,
    progress: Progress | None = None,
    dump_dir: Path | None = None,
    calibration: Calibration | None = None,
) -> Compiled:
    """Lowers a checkpoint to its graph and runs the passes of the build's level and target.

    Without a calibration that its scheme wants, the graph is that of the build with plainly rounded weights.
    """
    calibration = calibration or Calibration()
    progress = progress or Silent()
    target = target_of(build)
    check_options(build, target.capabilities)
    notes: list[str] = []
    dtype = compute_dtype(build, target.capabilities, notes)
    build = resolve(build, checkpoint)
    progress.stage("building the graph")
    published = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in calibration.tensors}
    builder = ModelBuilder(replace(checkpoint, tensors=published), build, dtype)
    network = builder_for(checkpoint)(builder)
    notes += _unread_note(builder)
    build = clamp(build, network.info, notes)
    verify(network.graph, after="the model builder")
    context = PassContext(
        build,
        target.capabilities,
        notes=notes,
        stored=stored_quantizations(checkpoint.tensors),
        calibrated=calibration.weights,
        rescaled=calibration.rescaled,
        ranges=calibration.ranges,
    )
    before: dict[str, str] = {}

    def mark(cls: type[Pass]) -> None:
        if cls is LEGALIZE[0]:
            before.update(places_of(network.graph))

    reports = run_passes(network, pipeline(build.optimization_level), context, progress, dump_dir, ahead=mark)
    check_graph(network.graph, target.capabilities)
    for note in notes:
        progress.note(note)
    return Compiled(
        network,
        build,
        target,
        dtype,
        tuple(reports),
        tuple(context.near_misses),
        tuple(notes),
        network_hash(network.model),
        calibration.tokens,
        operator_plan(before, network.graph),
    )


def calibrated(
    checkpoint: Checkpoint,
    build: BuildConfig,
    progress: Progress,
    *,
    tokens: np.ndarray | None = None,
    threads: int = 0,
) -> Calibration:
    """What the build's scheme wants of calibration text, or of `tokens`; nothing when it wants none."""
    if not wants_calibration(build) and not wants_ranges(build):
        return Calibration()
    if tokens is None:
        tokens = calibration_tokens(checkpoint, build.calib_dataset, build.calib_size, build.calib_max_seq_length)
    plain = build.model_copy(update={"max_seq_len": tokens.shape[1], "max_input_len": tokens.shape[1]})
    network = builder_for(checkpoint)(ModelBuilder(checkpoint, plain, DType.FLOAT32))
    calibration = Calibration()
    if wants_calibration(build):
        calibration = calibrate_build(network, checkpoint, build, tokens, progress, threads=threads)
    if wants_ranges(build):
        reader = RecipeReader(checkpoint.tensors, threads=threads)
        calibration = replace(calibration, ranges=activation_ranges(network, reader, tokens, progress, threads=threads))
    return replace(calibration, tokens=tokens)


def _unread_note(builder: ModelBuilder) -> list[str]:
    keys = builder.config.unread()
    return [f"config.json keys without a use here: {', '.join(keys)}"] if keys else []


def run_passes(
    network: Network,
    passes: Iterable[type[Pass]],
    context: PassContext,
    progress: Progress,
    dump_dir: Path | None = None,
    ahead: Callable[[type[Pass]], None] = lambda _: None,
) -> list[PassReport]:
    """Runs passes in order, verifying after each one that changed something. `ahead` is told of each before it."""
    reports = []
    passes = list(passes)
    progress.stage("running passes", len(passes))
    if dump_dir is not None:
        dump(network.model, dump_dir, 0, "model")
    for index, cls in enumerate(passes, start=1):
        ahead(cls)
        changes = cls().run(network, context)
        if changes:
            verify(network.graph, after=f"pass {cls.name}")
        if dump_dir is not None:
            dump(network.model, dump_dir, index, cls.name)
        reports.append(PassReport(cls.name, changes))
        progress.advance(1)
    return reports


def compute_dtype(build: BuildConfig, capabilities: Capabilities, notes: list[str]) -> DType:
    """The type the graph computes in. Raises UnsupportedModelError when the target has neither it nor a fallback."""
    if build.quantization is not None and build.quantization not in capabilities.schemes:
        raise UnsupportedModelError(
            f"target {capabilities.target} does not run quantization {build.quantization}",
            f"it runs: {', '.join(sorted(capabilities.schemes))}",
        )
    if build.dtype == "auto":
        return capabilities.compute_dtypes[0]
    wanted = DType.of(build.dtype)
    if wanted in capabilities.compute_dtypes:
        return wanted
    fallback = capabilities.dtype_fallbacks.get(wanted)
    if fallback is None:
        raise UnsupportedModelError(
            f"target {capabilities.target} does not compute in {wanted.value}",
            f"it computes in: {', '.join(dtype.value for dtype in capabilities.compute_dtypes)}",
        )
    notes.append(f"target {capabilities.target} does not compute in {wanted.value}: using {fallback.value}")
    return fallback


def resolve(build: BuildConfig, checkpoint: Checkpoint) -> BuildConfig:
    """Fills in what is derived from the model: max_seq_len and max_input_len. Raises UsageError if too long.

    Without a wish of the user, an embedding model takes as many tokens as it was published for.
    """
    limit = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
    limit = limit if isinstance(limit, int) else DEFAULT_MAX_SEQ_LEN
    usual = min(limit, published_length(checkpoint) or DEFAULT_MAX_SEQ_LEN)
    max_seq_len = build.max_seq_len or max(usual, build.max_input_len or 0)
    longest = _longest(checkpoint, limit)
    if longest is not None and max_seq_len > longest:
        raise UsageError(
            f"max_seq_len {max_seq_len} exceeds the {longest} positions of {checkpoint.source}",
            f"use --max-seq-len {longest} or less",
        )
    max_input_len = build.max_input_len or max_seq_len
    return build.model_copy(update={"max_seq_len": max_seq_len, "max_input_len": max_input_len})


def clamp(build: BuildConfig, info: ModelInfo, notes: list[str]) -> BuildConfig:
    """The build without the positions that an encoder turned out not to have: RoBERTa's first rows are no positions."""
    assert build.max_seq_len is not None and build.max_input_len is not None
    if info.kind != "encoder" or build.max_seq_len <= info.max_positions:
        return build
    notes.append(f"max_seq_len is {info.max_positions}: the model has no more positions")
    limited = min(build.max_input_len, info.max_positions)
    return build.model_copy(update={"max_seq_len": info.max_positions, "max_input_len": limited})


def _longest(checkpoint: Checkpoint, limit: int) -> int | None:
    """Positions that have a meaning: `limit`, or what rotary scaling stretches it to; None when it is boundless."""
    rope = checkpoint.config.get("rope_scaling") or checkpoint.config.get("rope_parameters") or {}
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind == "dynamic":
        return None
    if kind not in ("linear", "yarn") or not isinstance(factor, int | float):
        return limit
    original = rope.get("original_max_position_embeddings") if kind == "yarn" else None
    return max(limit, int((original or limit) * factor))


def write_engine(
    checkpoint: Checkpoint,
    compiled: Compiled,
    output_dir: Path,
    progress: Progress,
    reader: RecipeReader | None = None,
    *,
    emits_network: bool = False,
) -> None:
    """Writes the engine directory, or that of its network, atomically."""
    reader = reader or RecipeReader(checkpoint.tensors)
    emit = compiled.target.emit_network if emits_network else compiled.target.emit
    assert emit is not None, "prepare_build refuses it"
    with writing_engine(output_dir) as writer:
        recipes = {weight.name: weight.recipe.to_json() for weight in compiled.weights}
        emitted = emit(compiled.network, compiled.build, reader, writer, progress)
        progress.stage("finishing")
        writer.write_json(RECIPES, recipes)
        writer.write_json(CONFIG, engine_config(checkpoint, compiled))
        if compiled.calibration_tokens is not None:
            write_calibration(writer, compiled.calibration_tokens, compiled.build)
        _write_assets(writer, checkpoint)
        manifest = Manifest(
            toolchain_version=_version("trtllm-toolchain"),
            target=emitted.target,
            network_hash=compiled.network_hash,
            files=writer.file_entries(),
            weights=tuple(emitted.weights),
            stripped=emitted.stripped,
            stripped_sources=pruned_hashes(checkpoint.tensors),
            packages={name: _version(name) for name in ("numpy", "onnx", "onnx-ir")},
        )
        writer.write_json(MANIFEST, manifest.to_json())


def engine_config(checkpoint: Checkpoint, compiled: Compiled) -> dict[str, Any]:
    """config.json of the engine: the model's facts, the build's, and the graph's inputs and outputs."""
    graph = compiled.network.graph
    return {
        "version": _version("trtllm-toolchain"),
        "source": {"format": checkpoint.format, "name": checkpoint.source},
        "pretrained_config": dict(checkpoint.config) | {"architecture": checkpoint.architecture},
        "build_config": compiled.build.model_dump(mode="json"),
        "model": compiled.network.info.to_json(),
        **({"cache": cache_record(compiled)} if compiled.network.info.cache else {}),
        "passes": {report.name: report.changes for report in compiled.passes},
        "notes": [*checkpoint.notes, *compiled.notes],
        "io": {
            "inputs": [_io(value) for value in graph.inputs],
            "outputs": [_io(value) for value in graph.outputs],
        },
    }


def _io(value: Any) -> dict[str, Any]:
    return {
        "name": value.name,
        "dtype": value.dtype.name,
        "shape": [extent if isinstance(extent, int) else extent.value for extent in value.shape],
    }


def _write_assets(writer: EngineWriter, checkpoint: Checkpoint) -> None:
    """The files for the runtime. Those in a folder told the build how to pool; that is in the graph now."""
    for name, content in checkpoint.assets.items():
        if "/" in name:
            continue
        writer.write_bytes(name, content if isinstance(content, bytes) else Path(content).read_bytes())


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
