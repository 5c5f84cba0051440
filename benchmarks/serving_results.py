"""What serving one list of requests gave: tokens with their times, and the figures made from them."""

import dataclasses
import itertools
import math
import statistics

from serving_workload import ServingRequest


@dataclasses.dataclass
class Completion:
    """The generated tokens of a request, and for each the second it was seen, after the start; empty when not timed."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)


def percentile(values: list[float], share: float) -> float:
    """Return the nearest-rank percentile: the smallest value that `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def require_complete(requests: list[ServingRequest], completions: list[Completion]) -> None:
    """Raise RuntimeError unless every request got the tokens it asked for: then all engines did the same work."""
    for index, (request, completion) in enumerate(zip(requests, completions, strict=True)):
        if len(completion.tokens) != request.new_tokens:
            raise RuntimeError(f"request {index} has {len(completion.tokens)} new tokens, asked {request.new_tokens}")


def throughput_figures(requests: list[ServingRequest], makespan: float) -> dict:
    """Tokens a second over the makespan: the generated ones, and with the prompts'."""
    generated = sum(request.new_tokens for request in requests)
    prompted = sum(len(request.prompt) for request in requests)
    return {
        "generated_rate": generated / makespan,
        "total_rate": (generated + prompted) / makespan,
        "makespan": makespan,
        "generated_tokens": generated,
        "prompt_tokens": prompted,
    }


def latency_figures(requests: list[ServingRequest], completions: list[Completion]) -> dict:
    """Milliseconds from a request's arrival to its first token, and between the tokens that follow."""
    pairs = list(zip(requests, completions, strict=True))
    first = [1e3 * (completion.seconds[0] - request.arrival) for request, completion in pairs]
    gaps = [
        1e3 * (after - before) for completion in completions for before, after in itertools.pairwise(completion.seconds)
    ]
    return {
        "ttft_p50": percentile(first, 0.5),
        "ttft_p99": percentile(first, 0.99),
        "itl_p50": percentile(gaps, 0.5),
        "itl_p99": percentile(gaps, 0.99),
    }


def overhead_figures(iterations: list[dict], batch: int) -> dict:
    """The part of an iteration spent outside the session, over the iterations that only decode, all `batch` of them."""
    shares, milliseconds = [], []
    for iteration in iterations:
        requests = iteration["inflightBatchingStats"]
        if requests["numGenRequests"] == batch and requests["numContextRequests"] == 0:
            outside = iteration["iterLatencyMS"] - iteration["sessionLatencyMS"]
            shares.append(outside / iteration["iterLatencyMS"])
            milliseconds.append(iteration["iterLatencyMS"])
    if not shares:
        raise RuntimeError(f"none of {len(iterations)} iterations decoded {batch} requests and nothing else")
    return {
        "overhead_median": statistics.median(shares),
        "overhead_p99": percentile(shares, 0.99),
        "iteration_ms": statistics.median(milliseconds),
        "iterations": len(shares),
    }
