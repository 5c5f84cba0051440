"""The targets by name; a target's library is loaded only when it emits."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trtllm.compiler.ir.capabilities import Capabilities

TARGETS: Mapping[str, str] = {
    "onnxruntime": "trtllm.compiler.targets.onnxruntime",
    "tensorrt": "trtllm.compiler.targets.tensorrt",
}


@dataclass(frozen=True)
class Target:
    """A capability table and the emitter that honours it."""

    capabilities: Capabilities
    emit: Callable[..., Any]
    library_version: Callable[[], str]


def target_named(name: str) -> Target:
    """The target of a name of `TARGETS`."""
    home = TARGETS[name]
    emitter = importlib.import_module(f"{home}.emit")
    return Target(importlib.import_module(f"{home}.capabilities").CAPABILITIES, emitter.emit, emitter.library_version)
