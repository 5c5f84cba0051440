"""TensorRT's own refit: other weights for a plan that was built to take them, on a GPU of the plan's kind.

It works on a deserialized engine, so that a session can refit the one that it serves with, and on a plan's file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.compiler.engine import CONFIG, ENGINE, MANIFEST, Engine, WeightEntry, open_engine, writing
from trtllm.compiler.targets.tensorrt.diagnostics import Log, logger
from trtllm.compiler.targets.tensorrt.emit import check_release
from trtllm.compiler.targets.tensorrt.library import Library, load
from trtllm.compiler.targets.tensorrt.package import is_package, mapped_weights
from trtllm.dtypes import DType
from trtllm.errors import BadInputError, TargetError, UnsupportedModelError, UsageError
from trtllm.progress import Progress, Silent

Payload = tuple[str, DType, np.ndarray]
"""A weight's name, its type, and its bytes as the network stores them."""


@dataclass(frozen=True)
class RefitSummary:
    """What a refit did."""

    refitted: tuple[str, ...]
    kept: tuple[str, ...]
    """Weights that were given and that the plan does not take by name: it has folded them into something else."""


def refit_engine(library: Library, engine: Any, weights: Iterable[Payload], log: Log | None = None) -> RefitSummary:
    """Gives a deserialized engine other weights; its contexts compute with them from the next execution on.

    Raises UnsupportedModelError for a plan that takes none, TargetError when the library refuses or still lacks some.
    """
    log = log or Log()
    if not getattr(engine, "refittable", False):
        raise UnsupportedModelError("the plan was built to keep its weights", "build it with --refittable")
    refitter = library.module.Refitter(engine, logger(library.module, log))
    names = set(refitter.get_all_weights())
    refitted, kept, alive = [], [], []
    for name, dtype, data in weights:
        if name not in names:
            kept.append(name)
            continue
        held = library.weights(dtype, data, data.nbytes // dtype.numpy.itemsize)
        alive.append((data, held))
        if not refitter.set_named_weights(name, held):
            raise TargetError(f"the plan refuses weight '{name}': {log.first_error()}", "it is of another model")
        refitted.append(name)
    missing = list(refitter.get_missing_weights())
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise TargetError(f"the plan also needs {listed}", "give every weight of the network")
    if not refitter.refit_cuda_engine():
        raise TargetError(f"the refit failed: {log.first_error() or 'the library says no reason'}", "build it again")
    return RefitSummary(tuple(refitted), tuple(kept))


def refit_plan(library: Library, plan: bytes, weights: Iterable[Payload]) -> tuple[bytes, RefitSummary]:
    """A serialized plan with other weights."""
    log = Log()
    runtime = library.module.Runtime(logger(library.module, log))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise TargetError(f"the plan does not load: {log.first_error()}", "it is of another version or GPU")
    summary = refit_engine(library, engine, weights, log)
    return bytes(memoryview(engine.serialize())), summary


def package_payloads(package: Engine, names: Iterable[str] | None = None) -> Iterable[Payload]:
    """The weights of a network directory, those named or all; each is valid while the next is taken."""
    wanted = None if names is None else set(names)
    with mapped_weights(package) as payloads:
        for entry in package.manifest.weights:
            if wanted is None or entry.name in wanted:
                data = payloads.mapping[payloads.offsets[entry.name] :][: entry.nbytes]
                yield entry.name, DType.of(entry.dtype), data


def refit_from_package(
    engine: Engine, package: Engine, output_dir: Path, *, progress: Progress | None = None
) -> tuple[Engine, RefitSummary]:
    """Writes `engine` with the weights of a network directory of the same network to `output_dir`.

    Raises BadInputError for another network, UnsupportedModelError when the plan does not take some of what differs.
    """
    progress = progress or Silent()
    if not is_package(package):
        raise UsageError(f"{package.path} is no network", "write one with --emit network")
    if package.manifest.network_hash != engine.manifest.network_hash:
        raise BadInputError(
            f"{package.path} is another network than {engine.path}", "its engine is built with --from-network"
        )
    library = load(version=engine.manifest.target.version)
    check_release(library, engine.manifest.target.version)
    progress.stage("refitting")
    plan, summary = refit_plan(library, (engine.path / ENGINE).read_bytes(), package_payloads(package))
    own = {entry.name: entry for entry in engine.manifest.weights}
    given = {entry.name: entry for entry in package.manifest.weights}
    stale = [name for name in summary.kept if given[name].sha256 != own[name].sha256]
    if stale:
        raise UnsupportedModelError(
            f"the plan does not take {', '.join(stale[:3])}, which differ", "build it again with --from-network"
        )
    return _written(engine, given, plan, output_dir), summary


def _written(engine: Engine, given: Mapping[str, WeightEntry], plan: bytes, output_dir: Path) -> Engine:
    with writing(output_dir) as writer:
        for name in engine.manifest.files:
            if name not in (ENGINE, CONFIG, MANIFEST):
                writer.write_bytes(name, (engine.path / name).read_bytes())
        writer.write_bytes(ENGINE, plan)
        writer.write_json(CONFIG, dict(engine.config))
        weights = tuple(replace(entry, sha256=given[entry.name].sha256) for entry in engine.manifest.weights)
        writer.write_json(MANIFEST, replace(engine.manifest, weights=weights, files=writer.file_entries()).to_json())
    return open_engine(output_dir, verify=False)
