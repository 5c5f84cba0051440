"""Compare prefill and decode speed of TensorRT engines with transformers on one GPU, in turns, in one run.

    python3.10 benchmarks/gpu_generation.py --engine smollm2=ENGINE --engine llama-1b=ENGINE \\
        --peer-python /usr/bin/python3 --rounds 2 --json build/gpu/generation.json

Ours runs through the executor, one process an engine and round; transformers (torch, CUDA, float16, its fastest
attention) runs in the interpreter that --peer-python names, on random weights of the same shape. Both get the same
random prompts and generate without an end token. Decode is what a step takes while the whole batch generates; the floor
is the bytes of weights and cache that a step must read over --bandwidth. Needs numpy and cuda-bindings here, torch and
transformers there. CPU engines run too, for trying the script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BANDWIDTH = 4.3e12
"""Bytes a second that a copy on an H200 moves, read and written."""
SHAPES = {
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
    },
    "llama-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "rope_theta": 500000.0, "max_position_embeddings": 8192,
    },
}  # fmt: skip
MARK = "RESULT "
TIME_LIMIT_SECONDS = 500


def prompts_of(batch: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random tokens, other ones for every seed, so that nothing is reused."""
    import random

    draw = random.Random(f"{batch} {length} {seed}")
    return [[draw.randrange(10, vocab_size - 10) for _ in range(length)] for _ in range(batch)]


# -- ours ------------------------------------------------------------------------------------------------------------


def measure_engine(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second and milliseconds a step of one engine, at every batch size."""
    from trtllm import LLM, SamplingParams
    from trtllm.compiler.engine import open_engine
    from trtllm.runtime.llm_config import KvCacheConfig

    engine = open_engine(job["engine"], verify=False)
    begin = time.perf_counter()
    found: dict[str, Any] = {"batches": {}}
    cache = KvCacheConfig(enable_block_reuse=False)
    with LLM(engine, skip_tokenizer_init=True, kv_cache_config=cache, iter_stats_max_iterations=100000) as llm:
        found["load_seconds"] = time.perf_counter() - begin
        session = llm._session
        if hasattr(session, "warm_up"):
            begin = time.perf_counter()
            llm._executor.between_steps(session.warm_up)
            found["warm_up_seconds"] = time.perf_counter() - begin
            found["notes"] = session.notes
        vocab, seed = session.info.vocab_size, 0
        for batch in job["batches"]:
            if batch > session.info.max_batch_size:
                continue
            runs = []
            for _ in range(job["repeats"] + 1):
                seed += 1
                prompts = prompts_of(batch, job["prompt"], vocab, seed)
                runs.append(_timed_run(llm, SamplingParams, prompts, job))
            found["batches"][batch] = _summary(runs[1:], batch, job) | _session_times(session, batch, job)
    return found


def _timed_run(llm: Any, params_class: Any, prompts: list[list[int]], job: dict[str, Any]) -> dict[str, Any]:
    params = params_class(max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    first = params_class(max_tokens=1, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    llm.generate([prompt[::-1] for prompt in prompts], first)
    prefill = time.perf_counter() - begin
    llm.get_stats()
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params)
    whole = time.perf_counter() - begin
    assert all(len(output.outputs[0].token_ids) == job["tokens"] for output in outputs)
    steps = [
        (stats["iterLatencyMS"], stats.get("sessionLatencyMS", 0.0))
        for stats in llm.get_stats()
        if stats["inflightBatchingStats"]["numGenRequests"] == len(prompts)
        and not stats["inflightBatchingStats"]["numContextRequests"]
    ]
    return {"prefill": prefill, "whole": whole, "steps": steps}


def _session_times(session: Any, batch: int, job: dict[str, Any]) -> dict[str, Any]:
    """What one decode step takes in the session alone: the host's time, and the GPU's between two events."""
    import numpy as np

    size = session.info.cache.tokens_per_block
    columns = -(-session.info.max_seq_len // size)
    past = job["prompt"] + job["tokens"] // 2
    needed = past // size + 1
    if batch * needed > session.info.cache.num_blocks or not hasattr(session, "_device"):
        return {}
    tables = np.zeros((batch, columns), np.int32)
    tables[:, :needed] = np.arange(batch * needed).reshape(batch, needed)
    device, stream = session._device, session._stream
    begin, end = device.event(), device.event()
    queue = session._queue_rows

    def marked(*arguments: Any) -> None:
        device.record(begin, stream)
        queue(*arguments)
        device.record(end, stream)

    session._queue_rows = marked
    tokens, lengths = np.full(batch, 11), np.full(batch, past)
    hosts, gpus = [], []
    for _ in range(60):
        started = time.perf_counter()
        session.step(tokens, lengths, np.arange(batch + 1), lengths, np.arange(batch), [tables])
        hosts.append(time.perf_counter() - started)
        gpus.append(device.elapsed_ms(begin, end))
    session._queue_rows = queue
    return {"session_step_ms": 1e3 * statistics.median(hosts[10:]), "device_step_ms": statistics.median(gpus[10:])}


def _summary(runs: list[dict[str, Any]], batch: int, job: dict[str, Any]) -> dict[str, Any]:
    prefill = statistics.median(run["prefill"] for run in runs)
    whole = statistics.median(run["whole"] for run in runs)
    step = (whole - prefill) / (job["tokens"] - 1)
    result = {
        "prefill_tokens_per_second": batch * job["prompt"] / prefill,
        "decode_tokens_per_second": batch / step,
        "decode_step_ms": 1e3 * step,
        "whole_tokens_per_second": batch * job["tokens"] / whole,
    }
    steps = [pair for run in runs for pair in run.get("steps", ())]
    if steps:
        result["executor_step_ms"] = statistics.median(pair[0] for pair in steps)
        result["of_that_session_ms"] = statistics.median(pair[1] for pair in steps)
    return result


# -- transformers ----------------------------------------------------------------------------------------------------


def measure_transformers(job: dict[str, Any]) -> dict[str, Any]:
    """The same of transformers' generate, with the attention that is fastest at decoding a batch of 8."""
    import torch
    import transformers

    device = job["device"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**job["shape"], bos_token_id=1, eos_token_id=2)
    dtype = torch.float16 if device == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    found: dict[str, Any] = {"batches": {}, "torch": torch.__version__, "transformers": transformers.__version__}
    trials = {}
    for name in ("sdpa", "flash_attention_2", "eager"):
        try:
            model.set_attn_implementation(name)
            _generate(torch, model, 8, job | {"tokens": 8}, 1)
            trials[name] = _generate(torch, model, 8, job | {"tokens": 24}, 2)
        except Exception as error:
            found.setdefault("unavailable", {})[name] = str(error).splitlines()[0][:100]
    best = min(trials, key=lambda name: trials[name])
    found["attention"], found["attention_trials_s"] = best, trials
    model.set_attn_implementation(best)
    for batch in job["batches"]:
        runs = []
        for repeat in range(job["repeats"] + 1):
            prefill = _generate(torch, model, batch, job | {"tokens": 1}, 100 + 2 * repeat)
            runs.append({"prefill": prefill, "whole": _generate(torch, model, batch, job, 101 + 2 * repeat)})
        found["batches"][batch] = _summary(runs[1:], batch, job)
    return found


def _generate(torch: Any, model: Any, batch: int, job: dict[str, Any], seed: int) -> float:
    prompts = prompts_of(batch, job["prompt"], job["shape"]["vocab_size"], seed)
    ids = torch.tensor(prompts, device=job["device"])
    if job["device"] == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=job["tokens"], do_sample=False, use_cache=True
        )
    made.cpu()
    seconds = time.perf_counter() - begin
    assert made.shape[1] == job["prompt"] + job["tokens"]
    return seconds


# -- in turns --------------------------------------------------------------------------------------------------------


def floor_ms(shape: dict[str, Any], batch: int, job: dict[str, Any], bandwidth: float) -> float:
    """Milliseconds that reading the weights and the cache of a decode step takes, in float16."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    head = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    keys = head * shape["num_key_value_heads"]
    attention = hidden * (2 * head * shape["num_attention_heads"] + 2 * keys)
    weights = layers * (attention + 3 * hidden * shape["intermediate_size"]) + hidden * shape["vocab_size"]
    cache = batch * (job["prompt"] + job["tokens"] // 2) * layers * 2 * keys
    return 1e3 * 2 * (weights + cache) / bandwidth


def run_process(python: str, job: dict[str, Any], *, clean: bool) -> dict[str, Any]:
    """One job in a process of its own. `clean`: without what makes this interpreter find its own packages."""
    environment = dict(os.environ)
    if clean:
        for name in ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH"):
            environment.pop(name, None)
        if job["path"]:
            environment["PYTHONPATH"] = job["path"]
    command = [python, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {TIME_LIMIT_SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(lines[-1][len(MARK) :])
    return result


def medians(rounds: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """Medians over the rounds that brought a result."""
    good = [one["batches"][str(batch)] for one in rounds if str(batch) in one.get("batches", {})]
    return {key: statistics.median(one[key] for one in good) for key in good[0]} if good else {}


def table(report: dict[str, Any]) -> str:
    """One line for each model and batch size."""
    lines = [
        "| model | batch | ours prefill tok/s | transformers | ratio | ours decode tok/s | transformers | ratio "
        "| step ms | session ms | device ms | floor ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in report["results"]:
        ours, peer = one["ours"], one["transformers"]

        def ratio(key: str, ours: Any = ours, peer: Any = peer) -> str:
            return f"{ours[key] / peer[key]:.2f}" if key in ours and key in peer else "-"

        def number(values: Any, key: str, digits: int = 0) -> str:
            return f"{values[key]:.{digits}f}" if key in values else "-"

        cells = [one["model"], str(one["batch"])]
        for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
            cells += [number(ours, key), number(peer, key), ratio(key)]
        cells += [number(ours, key, 3) for key in ("decode_step_ms", "session_step_ms", "device_step_ms")]
        lines.append("| " + " | ".join([*cells, f"{one['floor_ms']:.3f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs all jobs in turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--engine", action="append", default=[], metavar="SHAPE=DIR", help=f"one of {', '.join(SHAPES)}"
    )
    parser.add_argument("--peer-python", help="interpreter with torch and transformers; without it only ours runs")
    parser.add_argument("--peer-path", default="", help="PYTHONPATH of that interpreter")
    parser.add_argument("--peer-device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--tokens", type=int, default=128, help="new ones of each sequence")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="runs in a round, after one that is not counted")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes a second, for the floor")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        job = json.loads(arguments.job)
        measure = measure_engine if "engine" in job else measure_transformers
        print(MARK + json.dumps(measure(job)), flush=True)
        return
    common = {
        "batches": arguments.batches, "prompt": arguments.prompt, "tokens": arguments.tokens,
        "repeats": arguments.repeats, "path": arguments.peer_path,
    }  # fmt: skip
    report: dict[str, Any] = {"settings": common | {"rounds": arguments.rounds}, "runs": {}, "results": []}
    for given in arguments.engine:
        name, _, folder = given.partition("=")
        ours: list[dict[str, Any]] = []
        theirs: list[dict[str, Any]] = []
        for number in range(arguments.rounds):
            ours.append(run_process(sys.executable, common | {"engine": folder}, clean=False))
            print(name, "ours", number, json.dumps(ours[-1]), flush=True)
            if arguments.peer_python:
                job = common | {"shape": SHAPES[name], "device": arguments.peer_device}
                theirs.append(run_process(arguments.peer_python, job, clean=True))
                print(name, "transformers", number, json.dumps(theirs[-1]), flush=True)
        report["runs"][name] = {"ours": ours, "transformers": theirs}
        for batch in arguments.batches:
            floor = floor_ms(SHAPES[name], batch, common, arguments.bandwidth)
            report["results"].append(
                {
                    "model": name, "batch": batch, "ours": medians(ours, batch),
                    "transformers": medians(theirs, batch), "floor_ms": floor,
                }
            )  # fmt: skip
    print(table(report))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
