"""Run one engine in this process and print what it did as one line of JSON; started by generation.py."""

import dataclasses
import importlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

from measurement import Timing, Workload, time_generation

# name in the table -> (class in peers.py, or "trtllm"; file or folder under build/bench)
ENGINES = {
    "trtllm fp32": ("trtllm", "trtllm-fp32"),
    "trtllm W4A16": ("trtllm", "trtllm-w4a16"),
    "trtllm W8A16": ("trtllm", "trtllm-w8a16"),
    "llama.cpp F16": ("LlamaCpp", "f16.gguf"),
    "llama.cpp Q4_0": ("LlamaCpp", "q4_0.gguf"),
    "genai fp32": ("Genai", "genai-fp32"),
    "genai int4": ("Genai", "genai-int4"),
    "genai int4, block 128": ("Genai", "genai-int4-block128"),
    "genai int4, 8-bit head": ("Genai", "genai-int4-head8"),
    "transformers fp32": ("Transformers", "hf-fp32"),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One process: an engine, a workload, and either prompts to continue (a check of the text) or none (a timing)."""

    engine: str
    folder: str
    workload: Workload
    check_prompt: list[int] | None = None


def measure_trtllm(engine_dir: Path, workload: Workload) -> Timing:
    """Time our own engine through its public door; a step is the mean of what remains after a prefill-only run."""
    from trtllm import LLM, SamplingParams

    llm = LLM(str(engine_dir), threads=workload.threads)
    first = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
    whole = SamplingParams(max_tokens=workload.new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    timing = Timing()
    for repeat in range(workload.repeats + 1):
        # Two sets of prompts: the second run must not find the first one's cache blocks.
        prefill_seconds = seconds_of(llm, workload.prompts(2 * repeat), first)
        whole_seconds = seconds_of(llm, workload.prompts(2 * repeat + 1), whole)
        if repeat > 0:  # the first one warms up
            timing.prefill_seconds.append(prefill_seconds)
            timing.step_seconds.append((whole_seconds - prefill_seconds) / (workload.new_tokens - 1))
    return timing


def seconds_of(llm, prompts: list[list[int]], sampling_params) -> float:
    """Generate for all prompts, see that every row is as long as was asked, and return the seconds it took."""
    started = time.perf_counter()
    outputs = llm.generate(prompts, sampling_params)
    elapsed = time.perf_counter() - started
    lengths = {len(output.outputs[0].token_ids) for output in outputs}
    if lengths != {sampling_params.max_tokens}:
        raise RuntimeError(f"asked for {sampling_params.max_tokens} new tokens, rows have {sorted(lengths)}")
    return elapsed


def continue_with_trtllm(engine_dir: Path, prompt: list[int], new_tokens: int) -> list[int]:
    """Return the greedy continuation of one prompt."""
    from trtllm import LLM, SamplingParams

    parameters = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return list(LLM(str(engine_dir)).generate([prompt], parameters)[0].outputs[0].token_ids)


def load_peer(job: Job, batch: int, max_length: int):
    """Load the peer's class and its model."""
    class_name, file = ENGINES[job.engine]
    peer = getattr(importlib.import_module("peers"), class_name)
    return peer(Path(job.folder) / file, batch, max_length, job.workload.threads)


def check(job: Job) -> dict:
    """Continue the check prompt greedily."""
    kind, file = ENGINES[job.engine]
    new_tokens = job.workload.new_tokens
    if kind == "trtllm":
        return {"tokens": continue_with_trtllm(Path(job.folder) / file, job.check_prompt, new_tokens)}
    engine = load_peer(job, 1, len(job.check_prompt) + new_tokens)
    tokens = engine.prefill([job.check_prompt])
    return {"tokens": tokens + [engine.step()[0] for _ in range(new_tokens - 1)]}


def measure(job: Job) -> dict:
    """Time the workload."""
    kind, file = ENGINES[job.engine]
    workload = job.workload
    if kind == "trtllm":
        timing = measure_trtllm(Path(job.folder) / file, workload)
    else:
        timing = time_generation(workload, load_peer(job, workload.batch, workload.prompt_length + workload.new_tokens))
    return {
        "prefill": timing.prefill_rate(workload),
        "decode_median": timing.median_step_rate(workload),
        "decode_mean": timing.mean_step_rate(workload),
        "slowest_step_ms": 1e3 * max(timing.step_seconds),
        "median_step_ms": 1e3 * statistics.median(timing.step_seconds),
    }


def limit_threads(threads: int) -> None:
    """Give every engine the same processors, and the libraries that read it the same thread count."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def main() -> None:
    fields = json.loads(sys.argv[1])
    job = Job(**{**fields, "workload": Workload(**fields["workload"])})
    limit_threads(job.workload.threads)
    result = check(job) if job.check_prompt else measure(job)
    print("\n" + json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # some libraries take seconds to tear down, or crash while they do


if __name__ == "__main__":
    main()
