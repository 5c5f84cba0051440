"""Run one contender of the serving benchmark in this process and print one line of JSON; started by serving.py."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Literal, Protocol

from engine_process import limit_threads
from llama_parallel import LlamaOptions
from serving_results import Completion, latency_figures, overhead_figures, require_complete, throughput_figures
from serving_workload import (
    LONGEST_SEQUENCE,
    Mix,
    ServingRequest,
    make_requests,
    prefix_requests,
    steady_requests,
    warm_up_requests,
)

Kind = Literal["inflight", "one by one", "llama", "llama-server", "transformers", "genai"]
Mode = Literal["throughput", "online", "prefix", "overhead", "check"]
OUR_ENGINE = "trtllm-serving-w4a16"
CHECK_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Contender:
    """How an engine is run; `file` lies under build/bench."""

    kind: Kind
    file: str
    slots: int = 8
    flash_attention: bool = True
    unified_cache: bool = False
    micro_batch: int = 512

    @property
    def is_ours(self) -> bool:
        return self.kind in ("inflight", "one by one")

    @property
    def llama_options(self) -> LlamaOptions:
        return LlamaOptions(self.slots, self.flash_attention, self.unified_cache, self.micro_batch)


CONTENDERS = {
    "trtllm W4A16, in flight, 8": Contender("inflight", OUR_ENGINE),
    "trtllm W4A16, in flight, 16": Contender("inflight", OUR_ENGINE, slots=16),
    "trtllm W4A16, one by one": Contender("one by one", OUR_ENGINE, slots=1),
    "llama.cpp Q4_0, 8 slots": Contender("llama", "q4_0.gguf"),
    "llama.cpp Q4_0, 8 slots, no flash": Contender("llama", "q4_0.gguf", flash_attention=False),
    "llama.cpp Q4_0, 16 slots": Contender("llama", "q4_0.gguf", slots=16),
    "llama-server Q4_0, 8 slots": Contender("llama-server", "q4_0.gguf"),
    "genai int4, static 8": Contender("genai", "genai-int4"),
    "transformers fp32, static 8": Contender("transformers", "hf-fp32"),
}
# The settings of llama.cpp that `--tune` compares.
LLAMA_VARIANTS = {
    f"llama.cpp, {'flash' if flash else 'plain'}, {'unified' if unified else 'split'} cache, ubatch {micro_batch}": (
        Contender("llama", "q4_0.gguf", 8, flash, unified, micro_batch)
    )
    for flash in (True, False)
    for unified in (True, False)
    for micro_batch in (128, 512, 2048)
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One process: a contender and what it shall do; which requests follows from the mix."""

    contender: str
    mode: Mode
    folder: str
    mix: Mix
    threads: int
    llama_server: str
    system_length: int = 1000
    check_prompt: list[int] = dataclasses.field(default_factory=list)


class Server(Protocol):
    """A loaded contender."""

    def serve(self, requests: list[ServingRequest]) -> list[Completion]:
        """Serve every request from its arrival on, greedily and past end tokens; completions in the same order."""

    def close(self) -> None:
        """End what would outlive this process."""


def open_server(job: Job) -> Server:
    """Load a contender."""
    contender = (CONTENDERS | LLAMA_VARIANTS)[job.contender]
    path = Path(job.folder) / contender.file
    if contender.is_ours:
        import serving_trtllm

        ours = serving_trtllm.TrtllmInflight if contender.kind == "inflight" else serving_trtllm.TrtllmOneByOne
        return ours(path, contender.slots, job.threads)
    if contender.kind == "llama":
        from llama_parallel import LlamaParallel

        return LlamaParallel(path, contender.llama_options, LONGEST_SEQUENCE, job.threads)
    if contender.kind == "llama-server":
        from llama_server import LlamaServer

        return LlamaServer(path, contender.llama_options, LONGEST_SEQUENCE, job.threads, job.llama_server)
    import serving_static

    static = serving_static.GenaiStatic if contender.kind == "genai" else serving_static.TransformersStatic
    return static(path, contender.slots, job.threads)


def timed_serve(server: Server, requests: list[ServingRequest]) -> tuple[list[Completion], float]:
    """Serve, see that nothing is missing, and return the completions and the seconds it took."""
    started = time.perf_counter()
    completions = server.serve(requests)
    elapsed = time.perf_counter() - started
    require_complete(requests, completions)
    return completions, elapsed


def measure_mix(server: Server, job: Job) -> dict:
    """Serve the mix; with a rate, its latencies too."""
    requests = make_requests(job.mix)
    completions, elapsed = timed_serve(server, requests)
    figures = throughput_figures(requests, elapsed)
    return figures | (latency_figures(requests, completions) if job.mode == "online" else {})


def measure_prefix(server: Server, job: Job) -> dict:
    """Milliseconds to the first token of two requests with one system prompt, the second after the first."""
    first, second = (timed_serve(server, [item])[1] for item in prefix_requests(job.mix.seed, job.system_length))
    return {"first_ttft": 1e3 * first, "second_ttft": 1e3 * second}


def measure_overhead(server: Server, job: Job) -> dict:
    """What our executor adds to the session's time, from its own statistics."""
    slots = CONTENDERS[job.contender].slots
    server.llm.get_stats()  # forget the warm-up
    timed_serve(server, steady_requests(slots, 256, job.mix.seed))
    return overhead_figures(server.llm.get_stats(), slots)


def check(server: Server, job: Job) -> dict:
    """Continue the check prompt in the middle of other requests, so that a mix-up of rows would show."""
    requests = [dataclasses.replace(item, arrival=0.0) for item in make_requests(job.mix)]
    middle = len(requests) // 2
    requests.insert(middle, ServingRequest(job.check_prompt, CHECK_TOKENS))
    return {"tokens": timed_serve(server, requests)[0][middle].tokens}


MODES = {
    "throughput": measure_mix,
    "online": measure_mix,
    "prefix": measure_prefix,
    "overhead": measure_overhead,
    "check": check,
}


def main() -> None:
    fields = json.loads(sys.argv[1])
    job = Job(**{**fields, "mix": Mix(**fields["mix"])})
    limit_threads(job.threads)
    server = open_server(job)
    try:
        server.serve(warm_up_requests())
        result = MODES[job.mode](server, job)
    finally:
        server.close()
    print("\n" + json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # some libraries take seconds to tear down, or crash while they do


if __name__ == "__main__":
    main()
