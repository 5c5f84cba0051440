"""What one engine's process reports, the prompts it gets and the clock it is timed with."""

import dataclasses
import itertools
import random
import statistics
import time
from typing import Protocol

# Token ids drawn from here are ordinary words of SmolLM2's vocabulary of 49,152; none is a special token.
FIRST_TOKEN, LAST_TOKEN = 1000, 40000


@dataclasses.dataclass(frozen=True)
class Workload:
    """The shape of one measurement: `repeats` times a batch of prompts and its generation, after one warm-up."""

    batch: int
    prompt_length: int
    new_tokens: int
    repeats: int
    threads: int
    seed: int

    def prompts(self, repeat: int) -> list[list[int]]:
        """Return fresh prompts for a repeat, so that no engine can reuse the cache of an earlier one."""
        source = random.Random(f"{self.seed}/{repeat}")
        return [
            [source.randrange(FIRST_TOKEN, LAST_TOKEN) for _ in range(self.prompt_length)] for _ in range(self.batch)
        ]


@dataclasses.dataclass
class Timing:
    """Seconds of every prefill (up to and with the first token) and of every decode step that followed."""

    prefill_seconds: list[float] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)

    def prefill_rate(self, workload: Workload) -> float:
        """Prompt tokens per second, all rows of the batch together, of the median prefill."""
        return workload.batch * workload.prompt_length / statistics.median(self.prefill_seconds)

    def median_step_rate(self, workload: Workload) -> float:
        """New tokens per second of the median step."""
        return workload.batch / statistics.median(self.step_seconds)

    def mean_step_rate(self, workload: Workload) -> float:
        """New tokens per second over all steps."""
        return workload.batch / statistics.fmean(self.step_seconds)


class Engine(Protocol):
    """A loaded peer: greedy generation of a batch, one step at a time, that never stops by itself."""

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Forget the last batch, run these prompts and return the first token of each."""

    def step(self) -> list[int]:
        """Append the last tokens and return the next ones."""


def time_generation(workload: Workload, engine: Engine) -> Timing:
    """Time the prefill, which also picks the first token, and the steps that make the others."""
    timing = Timing()
    for repeat in range(workload.repeats + 1):
        prompts = workload.prompts(repeat)
        started = time.perf_counter()
        engine.prefill(prompts)
        marks = [time.perf_counter()]
        for _ in range(workload.new_tokens - 1):
            engine.step()
            marks.append(time.perf_counter())
        if repeat > 0:  # the first one warms up
            timing.prefill_seconds.append(marks[0] - started)
            timing.step_seconds += [after - before for before, after in itertools.pairwise(marks)]
    return timing
