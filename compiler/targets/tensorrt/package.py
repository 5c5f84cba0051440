"""The second phase of a build: an engine of a network that another machine wrote, without its model or checkpoint.

It loads no frontend, no pass and no model code: what they did is in the network.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.recipes import Recipe, recipe_from_json
from trtllm.compiler.engine import (
    CONFIG,
    MANIFEST,
    RECIPES,
    Engine,
    EngineWriter,
    Manifest,
    check_free,
    open_engine,
    writing,
)
from trtllm.compiler.ir.network import CacheLayer, ModelInfo, Network
from trtllm.compiler.ir.text import from_bytes
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.targets.tensorrt.emit import (
    NETWORK,
    NETWORK_FLAVOUR,
    NETWORK_WEIGHTS,
    check_release,
    emit_plan,
)
from trtllm.compiler.targets.tensorrt.library import load
from trtllm.compiler.targets.tensorrt.payloads import Payloads
from trtllm.config import BuildConfig, build_config
from trtllm.errors import BadInputError, UsageError
from trtllm.progress import Progress, Silent


@dataclass(frozen=True, eq=False)
class Package:
    """A checked network directory."""

    engine: Engine
    """The directory, which is laid out like an engine's."""
    build: BuildConfig

    @property
    def weights_nbytes(self) -> int:
        return self.engine.manifest.weights_nbytes


def is_package(engine: Engine) -> bool:
    """Whether a directory is a network that is to be finished."""
    return engine.manifest.target.flavour == NETWORK_FLAVOUR


def open_package(path: str | Path, *, verify: bool = True) -> Package:
    """Checks the files of a network directory. Raises BadInputError for damage, UsageError for an engine."""
    engine = open_engine(path, verify=verify)
    if not is_package(engine):
        raise UsageError(f"{path} is a finished engine", "--from-network takes what --emit network wrote")
    return Package(engine, build_config(engine.config["build_config"]))


def finish_package(
    package: Package, output_dir: Path, *, changes: Mapping[str, Any] | None = None, progress: Progress | None = None
) -> Engine:
    """Builds the engine `output_dir`; `changes` are options of the builder that take the place of the package's.

    Raises TargetError when the library is missing, of another range of versions, or refuses.
    """
    progress = progress or Silent()
    check_free(output_dir.absolute())
    build, own = changed(package.build, changes or {}), package.engine
    library = load(version=build.tensorrt_version)
    check_release(library, own.manifest.target.version)
    network = package_network(own)
    with writing(output_dir) as writer:
        for name in own.manifest.files:
            if name not in (NETWORK_WEIGHTS, CONFIG, MANIFEST):
                _copy(own, name, writer)
        with mapped_weights(own) as payloads:
            emitted = emit_plan(library, network, build, payloads, writer, progress)
        progress.stage("finishing")
        writer.write_json(CONFIG, {**own.config, "build_config": build.model_dump(mode="json")})
        manifest: Manifest = replace(
            own.manifest, target=emitted.target, weights=tuple(emitted.weights), files=writer.file_entries()
        )
        writer.write_json(MANIFEST, manifest.to_json())
    return open_engine(output_dir, verify=False)


CHANGEABLE = (
    "tensorrt_version", "tensorrt_decode_batches", "tensorrt_prefill_lengths", "tensorrt_table_lengths",
    "builder_optimization_level", "profiling_verbosity", "weight_streaming", "refittable", "version_compatible",
    "hardware_compatibility_level", "strip_plan", "tensorrt_workspace_mb",
)  # fmt: skip
"""Options that say how a plan is built and not what the network computes."""


def changed(build: BuildConfig, changes: Mapping[str, Any]) -> BuildConfig:
    """The build with other options of the builder. Raises UsageError for those that are in the network already."""
    fixed = [name for name in changes if name not in CHANGEABLE]
    if fixed:
        raise UsageError(
            f"{', '.join(fixed)} cannot change: the network is made already",
            f"--from-network takes {', '.join(CHANGEABLE)}",
        )
    return build_config({**build.model_dump(), **changes})


def package_network(engine: Engine) -> Network:
    """The network that a directory keeps, its weights by name, type and shape."""
    path = engine.path / NETWORK
    if not path.is_file():
        raise BadInputError(f"{engine.path} keeps no {NETWORK}", "write the network again: --emit network")
    network = Network(from_bytes(path.read_bytes()), model_info(engine))
    attach_weights(network, {name: recipe_from_json(data) for name, data in _recipes(engine).items()})
    return network


def _recipes(engine: Engine) -> dict[str, Any]:
    import json

    try:
        data: dict[str, Any] = json.loads((engine.path / RECIPES).read_text(encoding="utf-8"))
        return data
    except (OSError, ValueError) as error:
        raise BadInputError(f"{engine.path / RECIPES} cannot be read: {error}", "copy the directory again") from None


def model_info(engine: Engine) -> ModelInfo:
    """The facts of config.json as the emitter takes them."""
    facts = dict(engine.config["model"])
    facts["cache"] = tuple(CacheLayer(**layer) for layer in facts.get("cache", ()))
    known = {field.name for field in fields(ModelInfo)}
    return ModelInfo(**{key: value for key, value in facts.items() if key in known})


def attach_weights(network: Network, recipes: Mapping[str, Recipe]) -> None:
    """Gives the graph's placeholders their recipes."""
    for name, value in network.graph.initializers.items():
        if name in recipes and isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = Weight(name, recipes[name])


@contextmanager
def mapped_weights(engine: Engine) -> Iterator[Payloads]:
    """The payloads of a network directory, mapped from its file."""
    entries = list(engine.manifest.weights)
    with (engine.path / NETWORK_WEIGHTS).open("rb") as file:
        size = file.seek(0, 2)
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    yield Payloads(np.frombuffer(mapping, np.uint8), {entry.name: entry.offset for entry in entries}, entries)


def _copy(engine: Engine, name: str, writer: EngineWriter) -> None:
    writer.write_bytes(name, (engine.path / name).read_bytes())
    writer.file_hashes[name] = engine.manifest.files[name].sha256
