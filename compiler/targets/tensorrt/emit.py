"""Builds a serialized TensorRT plan from a legalized network, layer by layer, through the network API.

No ONNX parser stands between: it maps is_causal to the wrong corner, drops nonpad_kv_seqlen without a word and
multiplies the whole key cache by the scale.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.engine import ENGINE, EngineWriter, ProfileEntry, TargetEntry
from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.text import to_proto_without_weights
from trtllm.compiler.ir.weights import DTYPES, Weight
from trtllm.compiler.targets.emitted import Emitted
from trtllm.compiler.targets.tensorrt.diagnostics import STAGE, Log, logger, monitor
from trtllm.compiler.targets.tensorrt.emission import Emission
from trtllm.compiler.targets.tensorrt.library import Library, load
from trtllm.compiler.targets.tensorrt.operators.table import OPERATORS
from trtllm.compiler.targets.tensorrt.payloads import Payloads, stored_weights
from trtllm.compiler.targets.tensorrt.profiles import profiles, shapes_in
from trtllm.config import BuildConfig
from trtllm.errors import TargetError
from trtllm.progress import Progress

NETWORK = "network.onnx"
"""The legalized graph, its weights by name, type and shape: what the plan is built of again when they change."""


def library_version() -> str:
    """The installed TensorRT. Raises TargetError when there is none."""
    return load().version


def emit(
    network: Network, build: BuildConfig, reader: RecipeReader, writer: EngineWriter, progress: Progress
) -> Emitted:
    """Writes `rank0.engine`, the plan with its weights, and the network it was made of, for a refit."""
    library = load()
    values = (value.const_value for value in network.graph.initializers.values())
    weights = [tensor for tensor in values if isinstance(tensor, Weight)]
    planned = profiles(network.info, build)
    writer.write_bytes(NETWORK, to_proto_without_weights(network.model))
    progress.stage("reading weights", sum(weight.recipe.nbytes for weight in weights))
    with stored_weights(writer.folder, weights, reader, progress) as payloads:
        digest = _build(library, network, build, planned, payloads, writer.folder / ENGINE, progress)
        entries = payloads.entries
    writer.file_hashes[ENGINE] = digest
    target = TargetEntry(
        "tensorrt", library.version, library.flavour.minimum_version, build.compute_capabilities,
        flavour=library.flavour.name, profiles=planned,
    )  # fmt: skip
    return Emitted(target, entries)


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
    builder = library.module.Builder(logger(library.module, log))
    definition = library.create_network(builder)
    emission = Emission(library, definition, payloads.of, log)
    add_graph(emission, network.graph)
    config = builder.create_builder_config()
    library.configure(config, build)
    for entry in planned:
        _add_profile(builder, config, network.graph, entry)
    progress.stage(STAGE)
    config.progress_monitor = monitor(library.module, progress)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes) -> int:
            digest.update(data)
            return file.write(data)

        if not library.build(builder, definition, config, write) or log.errors:
            raise _failure(library, log, network.graph)
    return digest.hexdigest()


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


def _name_extents(e: Emission, value: ir.Value) -> None:
    """Equal names tell the library that extents are equal."""
    for axis, extent in enumerate(dims(value)):
        if isinstance(extent, str):
            e.of(value).set_dimension_name(axis, extent)


def _add_profile(builder: Any, config: Any, graph: ir.Graph, entry: ProfileEntry) -> None:
    profile = builder.create_optimization_profile()
    for value in graph.inputs:
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
