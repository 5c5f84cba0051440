"""Carries out a build request: one library call after the other, with their results shown."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from trtllm.compiler.engine import Engine
from trtllm.compiler.ir.text import write_graph
from trtllm.compiler.levels import pass_names
from trtllm.compiler.pipeline import Prepared, finish_build, prepare_build
from trtllm.compiler.plan import BuildLimits, check_plan
from trtllm.errors import UsageError, nearest
from trtllm.memory import peak_memory
from trtllm.passes.base import NearMiss
from trtllm.sizes import parse_size
from trtllm.tools.build_report import closing_lines, plan_lines, why_lines
from trtllm.tools.build_request import BuildRequest
from trtllm.tools.console import Console
from trtllm.tools.progress_display import Display, display_for


def perform(request: BuildRequest, console: Console) -> int:
    """Prepares, shows what was asked to be shown, and writes; raises what the library raises."""
    begun = time.monotonic()
    _check_pass(request.why)
    limits = BuildLimits(
        max_memory=parse_size(request.max_build_memory) if request.max_build_memory else None, threads=request.workers
    )
    build = request.build_config(console)
    with display_for(console, monitor_memory=request.monitor_memory) as display:
        prepared = prepare_build(
            request.model, build, request.output_dir, limits=limits, progress=display, dump_dir=request.dump_dir,
            calibrates=not request.plan_only, emits_network=request.emits == "network",
        )  # fmt: skip
        engine = None if request.plan_only else _write(request, prepared, limits, display)
    misses = [miss for miss in prepared.compiled.near_misses if miss.pass_name == request.why]
    _show(request, console, prepared, misses)
    if engine is None:
        check_plan(prepared.plan)
    seconds, peak = time.monotonic() - begun, peak_memory() or 0
    if console.level in ("debug", "info") and not request.plan_only:
        for line in closing_lines(request, prepared, engine, seconds, peak):
            console.say(line)
    console.result(_result(request, prepared, engine, seconds, peak, misses))
    return 0


def _write(request: BuildRequest, prepared: Prepared, limits: BuildLimits, display: Display) -> Engine | None:
    if request.visualize_dir is not None:
        display.note(f"graph without weights: {write_graph(prepared.compiled.network.model, request.visualize_dir)}")
    if request.dry_run:
        return None
    return finish_build(prepared, request.output_dir, limits=limits, progress=display)


def _show(request: BuildRequest, console: Console, prepared: Prepared, misses: Iterable[NearMiss]) -> None:
    if request.plan_only:
        for line in plan_lines(prepared.plan):
            console.say(line)
    if request.why is not None:
        for line in why_lines(request.why, prepared, list(misses)):
            console.say(line)


def _check_pass(name: str | None) -> None:
    known = pass_names()
    if name is not None and name not in known:
        raise UsageError(f"unknown pass {nearest(name, known)}", f"passes: {', '.join(known)}")


def _result(
    request: BuildRequest,
    prepared: Prepared,
    engine: Engine | None,
    seconds: float,
    peak: int,
    misses: Iterable[NearMiss],
) -> dict[str, Any]:
    """The JSON of docs/commands.md."""
    plan, compiled = prepared.plan, prepared.compiled
    return {
        "command": "trtllm-build",
        "built": engine is not None,
        "output_dir": str(request.output_dir),
        "target": plan.target,
        "dtype": plan.dtype,
        "quantization": plan.quantization,
        "engine_bytes": engine.nbytes if engine is not None else None,
        "network_hash": compiled.network_hash,
        "seconds": round(seconds, 3),
        "peak_memory": peak,
        "notes": [*prepared.checkpoint.notes, *compiled.notes],
        "why": [{"node": miss.node, "reason": miss.reason} for miss in misses],
        "plan": plan.to_json(),
    }
