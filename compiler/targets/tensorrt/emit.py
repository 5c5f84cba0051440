"""Builds a serialized TensorRT plan from a legalized network, layer by layer, through the network API.

No ONNX parser stands between: it maps is_causal to the wrong corner, drops nonpad_kv_seqlen without a word and
multiplies the whole key cache by the scale.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.engine import ENGINE, EngineWriter, ProfileEntry, TargetEntry
from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.text import to_proto_without_weights
from trtllm.compiler.ir.weights import DTYPES, Weight
from trtllm.compiler.targets.emitted import Emitted
from trtllm.compiler.targets.tensorrt.capabilities import release_of
from trtllm.compiler.targets.tensorrt.diagnostics import STAGE, Log, logger, monitor
from trtllm.compiler.targets.tensorrt.emission import Emission
from trtllm.compiler.targets.tensorrt.library import Library, load
from trtllm.compiler.targets.tensorrt.operators.table import OPERATORS
from trtllm.compiler.targets.tensorrt.payloads import Payloads, stored_weights
from trtllm.compiler.targets.tensorrt.profiles import longest_extent, profiles, shapes_in
from trtllm.compiler.targets.tensorrt.timing_cache import timing_cache_path
from trtllm.compiler.targets.tensorrt.versions import parse_version
from trtllm.compiler.targets.weights_file import write_weights
from trtllm.config import BuildConfig
from trtllm.errors import TargetError
from trtllm.progress import Progress

NETWORK = "network.onnx"
"""The legalized graph, its weights by name, type and shape: what the plan is built of again when they change."""
NETWORK_WEIGHTS = "network.weights"
"""The payloads of a network that has no plan yet."""
NETWORK_FLAVOUR = "network"
"""What the manifest calls a directory that is to be finished elsewhere."""


def library_version(version: str | None = None) -> str:
    """The installed TensorRT, of the kind of `version`. Raises TargetError when there is none."""
    return load(version=version).version


def emit(
    network: Network, build: BuildConfig, reader: RecipeReader, writer: EngineWriter, progress: Progress
) -> Emitted:
    """Writes `rank0.engine`, the plan with its weights, and the network it was made of, for a refit."""
    library = load(version=build.tensorrt_version)
    check_release(library, build.tensorrt_version)
    weights = weights_of(network)
    writer.write_bytes(NETWORK, to_proto_without_weights(network.model))
    progress.stage("reading weights", sum(weight.recipe.nbytes for weight in weights))
    with stored_weights(writer.folder, weights, reader, progress) as payloads:
        return emit_plan(library, network, build, payloads, writer, progress)


def emit_network(
    network: Network, build: BuildConfig, reader: RecipeReader, writer: EngineWriter, progress: Progress
) -> Emitted:
    """Writes the network and its weights: what a machine with the library and its GPU makes the plan of."""
    version = parse_version(build.tensorrt_version) if build.tensorrt_version else load().release
    release = release_of(version)
    weights = weights_of(network)
    writer.write_bytes(NETWORK, to_proto_without_weights(network.model))
    progress.stage("writing weights", sum(weight.recipe.nbytes for weight in weights))
    entries, digest = write_weights(writer.folder / NETWORK_WEIGHTS, weights, reader, progress)
    writer.file_hashes[NETWORK_WEIGHTS] = digest
    planned = profiles(network.info, build, gathers_cache=release.capabilities.gathers_cache)
    made, oldest = (".".join(map(str, part)) for part in (version.numbers, release.first))
    return Emitted(TargetEntry("tensorrt", made, oldest, flavour=NETWORK_FLAVOUR, profiles=planned), entries)


def weights_of(network: Network) -> list[Weight]:
    """The graph's weights, in its order."""
    values = (value.const_value for value in network.graph.initializers.values())
    return [tensor for tensor in values if isinstance(tensor, Weight)]


def check_release(library: Library, wanted: str | None) -> None:
    """Raises TargetError when a graph was made for another range of versions than the library's."""
    own = release_of(library.release)
    if wanted is not None and release_of(parse_version(wanted)) is not own:
        raise TargetError(
            f"the graph is for {release_of(parse_version(wanted)).name}, {library.release.label} is installed",
            f"build with --tensorrt-version {'.'.join(map(str, library.release.numbers[:2]))}",
        )


def emit_plan(
    library: Library, network: Network, build: BuildConfig, payloads: Payloads, writer: EngineWriter, progress: Progress
) -> Emitted:
    """Builds the plan of a network whose weights `payloads` holds, as `rank0.engine`."""
    table = release_of(library.release).capabilities
    planned = profiles(network.info, build, gathers_cache=table.gathers_cache)
    digest = _build(library, network, build, planned, payloads, writer.folder / ENGINE, progress)
    writer.file_hashes[ENGINE] = digest
    target = TargetEntry(
        "tensorrt", library.version, library.flavour.minimum_version, build.compute_capabilities,
        flavour=library.flavour.name, profiles=planned,
    )  # fmt: skip
    return Emitted(target, [replace(entry, file=ENGINE, offset=0) for entry in payloads.entries])


def _build(
    library: Library,
    network: Network,
    build: BuildConfig,
    planned: tuple[ProfileEntry, ...],
    payloads: Payloads,
    path: Path,
    progress: Progress,
) -> str:
    """Writes the plan to `path`; returns its sha256."""
    log = Log()
    builder = new_builder(library, log)
    definition = library.create_network(builder)
    emission = Emission(library, definition, payloads.of, log, longest=longest_extent(planned, build))
    add_graph(emission, network.graph)
    halves = _has_halves(network.graph)
    if halves and (held := library.set_precisions(definition)):
        progress.note(f"{held} of {definition.num_layers} layers are held to float32")
    config = builder.create_builder_config()
    library.configure(config, build, halves=halves, bytes_=_rounds(network.graph))
    for entry in planned:
        _add_profile(builder, config, network.graph, entry)
    cache = None if library.flavour.builds_without_gpu else timing_cache_path(library)
    if cache is not None:
        library.load_timing_cache(config, cache)
    progress.stage(STAGE)
    if hasattr(config, "progress_monitor"):
        config.progress_monitor = monitor(library.module, progress)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes) -> int:
            digest.update(data)
            return file.write(data)

        built = library.build(builder, definition, config, write)
        # Full TensorRT also calls it an error when one of many ways to run a layer fails.
        if not built or (library.is_rtx and log.errors):
            raise _failure(library, log, network.graph)
    if cache is not None:
        library.save_timing_cache(config, cache)
    return digest.hexdigest()


def new_builder(library: Library, log: Log) -> Any:
    """A builder. Raises TargetError where the library finds no GPU."""
    try:
        builder = library.module.Builder(logger(library.module, log))
    except (RuntimeError, TypeError) as error:  # pybind11 raises TypeError for a constructor that gives nothing
        raise _no_builder(library, log, error) from error
    if builder is None:
        raise _no_builder(library, log, None)
    return builder


def _no_builder(library: Library, log: Log, error: Exception | None) -> TargetError:
    reason = log.first_error() or str(error or "").split("\n")[0]
    return TargetError(
        f"{library.release.label} cannot start its builder: {reason or 'it says no reason'}",
        "it builds on a machine with an NVIDIA GPU and a driver of its CUDA; --emit network prepares everything else",
    )


def _has_halves(graph: ir.Graph) -> bool:
    return any(value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) for value in graph.initializers.values())


def _rounds(graph: ir.Graph) -> bool:
    return any(is_dialect(node, "ScaledLinear") for node in graph)


def add_graph(e: Emission, graph: ir.Graph) -> None:
    """Adds inputs, a layer or more for every node, and outputs."""
    for value in graph.inputs:
        shape = tuple(extent if isinstance(extent, int) else -1 for extent in dims(value))
        e.bind(value, e.network.add_input(value.name, e.library.data_type(DTYPES[dtype_of(value)]), shape))
        _name_extents(e, value)
    for node in graph:
        e.node = node
        tensors = OPERATORS[f"{node.domain}::{node.op_type}"](e, node)
        for value, tensor in zip(node.outputs, tensors, strict=True):
            if tensor is not None:
                e.bind(value, tensor)
        e.check(tensors)
    e.node = None
    for value in graph.outputs:
        tensor = e.of(value)
        tensor.name = value.name
        e.network.mark_output(tensor)
        if not e.library.is_strongly_typed:
            tensor.dtype = e.library.data_type(DTYPES[dtype_of(value)])


def _name_extents(e: Emission, value: ir.Value) -> None:
    """Equal names tell the library that extents are equal."""
    for axis, extent in enumerate(dims(value)):
        if isinstance(extent, str):
            e.of(value).set_dimension_name(axis, extent)


def _add_profile(builder: Any, config: Any, graph: ir.Graph, entry: ProfileEntry) -> None:
    profile = builder.create_optimization_profile()
    for value in graph.inputs:
        if any(isinstance(extent, str) for extent in dims(value)) or value.name == "input_ids":
            profile.set_shape(value.name, *shapes_in(value, entry))
    config.add_optimization_profile(profile)


def _failure(library: Library, log: Log, graph: ir.Graph) -> TargetError:
    """The builder's first error, with the graph node that its text names."""
    message = log.first_error() or "it says no reason"
    text = " ".join(log.errors)
    found = [(text.find(node.name), -len(node.name), node.name) for node in graph if node.name and node.name in text]
    node = min(found)[2] if found else None
    where = f" at node '{node}'" if node else ""
    return TargetError(
        f"{library.flavour.name} {library.version} cannot build the plan{where}: {message}",
        "try smaller maxima, another --dtype or --quantization; --dump DIR writes the graph for a report",
    )
