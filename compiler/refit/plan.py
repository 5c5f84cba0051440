"""Refit of engines whose file holds the weights itself: the plan is built again from the network that the engine keeps.

TensorRT's own refitter works on a deserialized plan, which takes a GPU of the plan's kind; this works on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Recipe
from trtllm.compiler.engine import Engine, EngineWriter, Manifest
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.text import from_bytes
from trtllm.compiler.targets.table import target_of
from trtllm.compiler.targets.tensorrt.emit import NETWORK
from trtllm.compiler.targets.tensorrt.package import attach_weights, model_info
from trtllm.config import build_config
from trtllm.errors import UnsupportedModelError
from trtllm.progress import Progress


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
    progress.note("the plan is built again from the network that the engine keeps: a plan is refitted on a GPU only")
    network = Network(from_bytes(path.read_bytes()), model_info(engine))
    attach_weights(network, recipes)
    build = build_config(engine.config["build_config"])
    emitted = target_of(build).emit(network, build, reader, writer, progress)
    return replace(
        engine.manifest, target=emitted.target, weights=tuple(emitted.weights), stripped=(), stripped_sources={}
    )
