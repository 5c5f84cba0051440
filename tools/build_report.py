"""The lines that `trtllm-build` prints of a plan, of a pass's refusals, and of a finished build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from trtllm.compiler.engine import Engine
from trtllm.compiler.pipeline import Prepared
from trtllm.compiler.plan import BuildPlan
from trtllm.passes.base import NearMiss
from trtllm.sizes import format_size
from trtllm.tools.build_request import BuildRequest

_SHOWN_MISSES = 5


def plan_lines(plan: BuildPlan) -> Iterator[str]:
    """A plan as "name  value" lines."""
    for name, value in _plan_rows(plan):
        yield f"{name:<14}{value}"
    for problem in plan.problems:
        yield f"{'DOES NOT FIT':<14}{problem}"


def _plan_rows(plan: BuildPlan) -> Iterator[tuple[str, str]]:
    yield "model", f"{plan.source} ({plan.architecture}, {format_size(plan.source_bytes)})"
    yield "engine", f"{plan.target}, {plan.dtype}, {plan.quantization or 'not quantized'}, -O{plan.optimization_level}"
    yield "limits", f"{plan.max_batch_size} sequences of {plan.max_seq_len} tokens, prompts of {plan.max_input_len}"
    yield "passes", _counts(plan.passes)
    yield "native", _counts(plan.native_operators)
    yield "standard", _counts(plan.standard_operators)
    if plan.release:
        yield "for", plan.release
        yield from _fates(plan)
    yield "weights", f"{plan.weights}, {format_size(plan.weights_bytes)}; engine {format_size(plan.engine_bytes)}"
    if plan.cache_bytes:
        yield (
            "cache",
            f"{format_size(plan.cache_bytes_per_token)} a token, {format_size(plan.cache_bytes)} when full",
        )
    yield (
        "build memory",
        f"about {format_size(plan.peak_memory)}, reading {format_size(plan.chunk_bytes)} at once"
        f"{_of(plan.available_memory, 'available')}{_of(plan.memory_limit, 'allowed')}",
    )
    yield "load memory", f"about {format_size(plan.load_memory)} with the cache full"
    yield "disk", f"{format_size(plan.disk_bytes)}{_of(plan.free_disk, 'free')}"


def _fates(plan: BuildPlan) -> Iterator[tuple[str, str]]:
    """The operators of the model that do not stay as they are, and options that the target does not take."""
    for entry in plan.operators:
        if entry.fate != "native":
            made = f"by {_counts(entry.becomes)}" if entry.becomes else "by its neighbours"
            partly = "partly " if entry.fate == "mixed" else ""
            yield "legalized", f"{entry.operator} {entry.count}, {partly}{made}"
    for name, why in plan.refused.items():
        yield "refused", f"{name}: {why}"


def _of(nbytes: int | None, word: str) -> str:
    return "" if nbytes is None else f"; {format_size(nbytes)} {word}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def why_lines(pass_name: str, prepared: Prepared, misses: Sequence[NearMiss]) -> Iterator[str]:
    """The places that a pass left alone, by reason."""
    if pass_name not in {report.name for report in prepared.compiled.passes}:
        yield f"{pass_name} does not run at -O{prepared.plan.optimization_level}"
    elif not misses:
        yield f"{pass_name} left nothing alone that it looked at"
    for reason, count in Counter(miss.reason for miss in misses).most_common():
        nodes = [miss.node for miss in misses if miss.reason == reason]
        rest = f" and {count - _SHOWN_MISSES} more" if count > _SHOWN_MISSES else ""
        yield f"{pass_name} left {count} alone: {reason} ({', '.join(nodes[:_SHOWN_MISSES])}{rest})"


def closing_lines(
    request: BuildRequest, prepared: Prepared, engine: Engine | None, seconds: float, peak: int
) -> Iterator[str]:
    """What was built, at what cost, and how to go on."""
    plan = prepared.plan
    kind = f"{plan.architecture}, {plan.target} {plan.dtype}{f' {plan.quantization}' if plan.quantization else ''}"
    cost = f"{seconds:.1f} s, peak memory {format_size(peak)}"
    if engine is None:
        yield f"dry run: {request.output_dir} would hold {kind}, {format_size(plan.engine_bytes)}; {cost}"
        return
    if request.emits == "network":
        yield f"wrote the network {request.output_dir}: {kind}, {format_size(engine.nbytes)}; {cost}"
        yield "finish it where its TensorRT and GPU are:"
        yield f"  trtllm-build --from-network {request.output_dir} --output-dir ENGINE"
        return
    yield f"built {request.output_dir}: {kind}, {format_size(engine.nbytes)}; {cost}"
    if prepared.compiled.network.info.kind == "decoder" and "tokenizer.json" in prepared.checkpoint.assets:
        yield "try it in Python:"
        yield "  from trtllm import LLM"
        yield f"  print(LLM({str(request.output_dir)!r}).generate('The capital of France is').outputs[0].text)"
