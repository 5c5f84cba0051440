"""The targets by name; a target's library is loaded only when it emits."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.config import BuildConfig

TARGETS: Mapping[str, str] = {
    "onnxruntime": "trtllm.compiler.targets.onnxruntime",
    "tensorrt": "trtllm.compiler.targets.tensorrt",
}


@dataclass(frozen=True)
class Target:
    """A capability table and the emitter that honours it."""

    capabilities: Capabilities
    emit: Callable[..., Any]
    library_version: Callable[..., str]
    emit_network: Callable[..., Any] | None = None
    """Writes what another machine makes the engine of, where the target has such a form."""


def target_named(name: str, version: str | None = None) -> Target:
    """The target of a name of `TARGETS`; `version` is of its library, where tables differ by it.

    Without one the installed library decides, or the newest table when there is none.
    """
    home = TARGETS[name]
    emitter = importlib.import_module(f"{home}.emit")
    tables = importlib.import_module(f"{home}.capabilities")
    choose = getattr(tables, "capabilities_for", None)
    table = choose(version) if choose is not None else tables.CAPABILITIES
    return Target(table, emitter.emit, emitter.library_version, getattr(emitter, "emit_network", None))


def target_of(build: BuildConfig) -> Target:
    """The target that a build asks for."""
    return target_named(build.target, build.tensorrt_version)
