"""A build's plan: what will be made, what it will cost, and whether it fits, before a byte is written."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.compiler import estimates
from trtllm.compiler.compiled import Compiled
from trtllm.compiler.operator_plan import OperatorPlan
from trtllm.errors import ResourceError
from trtllm.memory import available_memory, resident_memory
from trtllm.sizes import format_size


@dataclass(frozen=True)
class BuildLimits:
    """What a build may take of the machine."""

    max_memory: int | None = None
    """Bytes resident at most; None: what the machine has."""
    threads: int = 0
    """For quantization and conversion; 0: all cores."""


@dataclass(frozen=True)
class BuildPlan:
    """Sizes are bytes. Weights and cache are exact, memory and disk are estimates that err to the large side."""

    source: str
    architecture: str
    target: str
    dtype: str
    quantization: str | None
    optimization_level: int
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    passes: Mapping[str, int]
    """Places changed, by pass, for those that change something."""
    native_operators: Mapping[str, int]
    """How often the engine uses each of the target's own operators."""
    standard_operators: Mapping[str, int]
    """How often it uses each standard operator, whether the model had it or a pass made it."""
    release: str
    """The versions of the target's library that it is planned for; empty where that makes no difference."""
    operators: tuple[OperatorPlan, ...]
    """What the target makes of each operator of the model."""
    refused: Mapping[str, str]
    """Options that these versions do not take, and why, where the reason is known."""
    source_bytes: int
    weights: int
    """How many."""
    weights_bytes: int
    engine_bytes: int
    cache_bytes_per_token: int
    cache_bytes: int
    """Of max_batch_size sequences of max_seq_len tokens, in whole blocks where the cache is paged."""
    chunk_bytes: int
    """How much of a weight is read at once."""
    resident_memory: int
    """What the planning process holds already; part of peak_memory."""
    peak_memory: int
    largest_weight: str
    """The weight that decides peak_memory."""
    load_memory: int
    disk_bytes: int
    """Needed while building."""
    free_disk: int | None
    available_memory: int | None
    """What the machine or its control group leaves; resident_memory is not part of it."""
    memory_limit: int | None
    """The --max-build-memory given."""
    problems: tuple[str, ...]
    """Why the build cannot be; empty when it can."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_compiled(
    checkpoint: Checkpoint, compiled: Compiled, *, output_dir: Path | None = None, limits: BuildLimits | None = None
) -> BuildPlan:
    """The plan of a network that is ready to be emitted, on this machine; what does not fit is in its `problems`."""
    limits = limits or BuildLimits()
    build, resident = compiled.build, resident_memory() or 0
    fixed = resident + estimates.builder_memory(compiled)
    free_memory = available_memory()
    chunk_bytes = estimates.fitting_chunk(compiled.weights, checkpoint, _budget(limits, free_memory, resident, fixed))
    working = estimates.streaming_memory(compiled.weights, checkpoint, chunk_bytes)
    native, standard = _operators(compiled)
    peak, disk = fixed + working.nbytes, estimates.disk_nbytes(compiled, checkpoint)
    free_disk = _free_disk(output_dir) if output_dir is not None else None
    return BuildPlan(
        source=checkpoint.source,
        architecture=checkpoint.architecture,
        target=build.target,
        dtype=compiled.dtype.value,
        quantization=build.quantization,
        optimization_level=build.optimization_level,
        max_batch_size=build.max_batch_size,
        max_input_len=build.max_input_len or 0,
        max_seq_len=build.max_seq_len or 0,
        passes={report.name: report.changes for report in compiled.passes if report.changes},
        native_operators=native,
        standard_operators=standard,
        release=compiled.target.capabilities.release,
        operators=compiled.operators,
        refused=dict(compiled.target.capabilities.refusals),
        source_bytes=checkpoint.nbytes,
        weights=len(compiled.weights),
        weights_bytes=estimates.weights_nbytes(compiled),
        engine_bytes=estimates.engine_nbytes(compiled, checkpoint),
        cache_bytes_per_token=estimates.cache_nbytes_per_token(compiled),
        cache_bytes=estimates.cache_nbytes(compiled),
        chunk_bytes=chunk_bytes,
        resident_memory=resident,
        peak_memory=peak,
        largest_weight=working.largest_weight,
        load_memory=estimates.load_memory(compiled),
        disk_bytes=disk,
        free_disk=free_disk,
        available_memory=free_memory,
        memory_limit=limits.max_memory,
        problems=tuple(_problems(limits, peak, resident, working.largest_weight, free_memory, disk, free_disk)),
    )


def check_plan(plan: BuildPlan) -> None:
    """Raises ResourceError, with the numbers, when the plan has problems."""
    if plan.problems:
        raise ResourceError(
            f"the build does not fit: {'; '.join(plan.problems)}",
            "build on a larger machine or disk, choose a smaller --quantization, or raise --max-build-memory",
        )


def _budget(limits: BuildLimits, free_memory: int | None, resident: int, fixed: int) -> int | None:
    """Bytes that streaming may take beside what is taken anyway; None when nothing limits it."""
    bounds = [limits.max_memory, None if free_memory is None else free_memory + resident]
    given = [bound - fixed for bound in bounds if bound is not None]
    return min(given, default=None)


def _problems(
    limits: BuildLimits,
    peak: int,
    resident: int,
    largest_weight: str,
    free_memory: int | None,
    disk: int,
    free_disk: int | None,
) -> list[str]:
    problems = []
    decided = f"about {format_size(peak)} (decided by '{largest_weight}')"
    if limits.max_memory is not None and peak > limits.max_memory:
        problems.append(f"it needs {decided} of memory, --max-build-memory allows {format_size(limits.max_memory)}")
    if free_memory is not None and peak - resident > free_memory:
        problems.append(f"it needs {decided} of memory, {format_size(free_memory + resident)} are available")
    if free_disk is not None and disk > free_disk:
        problems.append(f"it needs {format_size(disk)} of disk, {format_size(free_disk)} are free")
    return problems


def _free_disk(output_dir: Path) -> int | None:
    """Bytes free where `output_dir` will be; None when nobody can tell."""
    folder = output_dir.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _operators(compiled: Compiled) -> tuple[dict[str, int], dict[str, int]]:
    native: Counter[str] = Counter()
    standard: Counter[str] = Counter()
    for node in compiled.network.graph:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        (native if compiled.target.capabilities.has(node.op_type, node.domain) else standard)[name] += 1
    return dict(native.most_common()), dict(standard.most_common())
