"""Carries out `trtllm-build --from-network`: the second phase of a build, which loads no model code."""

from __future__ import annotations

import time
from typing import Any

from trtllm.compiler.engine import Engine
from trtllm.compiler.targets.tensorrt.package import Package, finish_package, open_package
from trtllm.errors import UsageError
from trtllm.memory import peak_memory
from trtllm.sizes import format_size
from trtllm.tools.build_request import BuildRequest
from trtllm.tools.console import Console
from trtllm.tools.progress_display import display_for


def perform(request: BuildRequest, console: Console) -> int:
    """Checks the network, builds its plan and shows what that took; raises what the library raises."""
    assert request.from_network is not None
    begun = time.monotonic()
    if request.plan_only or request.dry_run or request.emits != "engine":
        raise UsageError("--from-network builds an engine and nothing else", "--plan goes with the model, before")
    package = open_package(request.from_network)
    with display_for(console, monitor_memory=request.monitor_memory) as display:
        engine = finish_package(package, request.output_dir, changes=request.given_options(console), progress=display)
    seconds, peak = time.monotonic() - begun, peak_memory() or 0
    if console.level in ("debug", "info"):
        target = engine.manifest.target
        console.say(
            f"built {request.output_dir}: {target.flavour} {target.version}, {len(target.profiles)} profiles, "
            f"{format_size(engine.nbytes)}; {seconds:.1f} s, peak memory {format_size(peak)}"
        )
    console.result(_result(request, package, engine, seconds, peak))
    return 0


def _result(request: BuildRequest, package: Package, engine: Engine, seconds: float, peak: int) -> dict[str, Any]:
    """The JSON of docs/commands.md."""
    return {
        "command": "trtllm-build",
        "built": True,
        "network": str(request.from_network),
        "output_dir": str(request.output_dir),
        "target": engine.target,
        "library": f"{engine.manifest.target.flavour} {engine.manifest.target.version}",
        "profiles": len(engine.manifest.target.profiles),
        "weights_bytes": package.weights_nbytes,
        "engine_bytes": engine.nbytes,
        "network_hash": engine.manifest.network_hash,
        "seconds": round(seconds, 3),
        "peak_memory": peak,
    }
