"""Proves a TensorRT engine of SmolLM2 on a GPU, and writes what was seen as JSON. Needs numpy and cuda-bindings alone.

    python tests/gpu/run_session.py --fp32 ENGINE --fp16 ENGINE --perturbed MODEL --perturbed-engine ENGINE \\
        --base MODEL --json build/gpu/session.json

Engines are directories of SmolLM2-135M-Instruct; `--perturbed` is a checkpoint of the same shape with other weights and
`--perturbed-engine` a float32 engine freshly built of it (make_perturbed.py makes both); `--base` is the model that the
engines were built from, which a revert reads. Checks whose engines are not given are left out. The exit
status is 0 when all checks hold.
"""

import argparse
import datetime
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trtllm import LLM, SamplingParams
from trtllm.compiler.engine import Engine, open_engine
from trtllm.runtime.executor import open_engine_session
from trtllm.runtime.llm_config import KvCacheConfig, LlmArgs

NEAR_TIE = 1e-3
HALF_TOLERANCE = 2e-2
REQUESTS = 200
REFERENCE = json.loads(Path(__file__).with_name("smollm2_reference.json").read_text(encoding="utf-8"))["prompts"]
GREEDY = SamplingParams(max_tokens=64, ignore_eos=True, detokenize=False)

Finding = dict[str, Any]


def opened(engine: Engine, **arguments: Any) -> LLM:
    return LLM(engine, skip_tokenizer_init=True, **arguments)


def greedy_tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate([item["prompt_token_ids"] for item in REFERENCE], GREEDY)
    return [output.outputs[0].token_ids for output in outputs]


def check_greedy(engine: Engine) -> Finding:
    """Greedy tokens are the reference's; where they part, its best two were nearly equal."""
    with opened(engine) as llm:
        found = greedy_tokens(llm)
    parted = []
    for item, tokens in zip(REFERENCE, found, strict=True):
        differs = np.flatnonzero(np.array(tokens) != np.array(item["token_ids"]))
        if differs.size:
            at = int(differs[0])
            tie = item["margins"][at] < NEAR_TIE and tokens[at] == item["second_ids"][at]
            parted.append({"prompt": item["prompt"], "at": at, "margin": item["margins"][at], "near_tie": tie})
    return {
        "holds": all(one["near_tie"] for one in parted),
        "prompts": len(found),
        "equal": len(found) - len(parted),
        "parted": parted,
    }


def forced_logits(engine: Engine) -> np.ndarray:
    """Logits [prompts, 64, V] along the reference's tokens: prompts in one step, then all of them token by token."""
    session = open_engine_session(engine, LlmArgs())
    size, columns = (
        session.info.cache.tokens_per_block,
        -(-session.info.max_seq_len // session.info.cache.tokens_per_block),
    )
    result = []
    for first in range(0, len(REFERENCE), session.info.max_batch_size):
        items = REFERENCE[first : first + session.info.max_batch_size]
        needed = max(-(-(len(item["prompt_token_ids"]) + 64) // size) for item in items)
        tables = np.zeros((len(items), columns), np.int32)
        tables[:, :needed] = np.arange(len(items) * needed).reshape(len(items), needed)
        new = [np.array(item["prompt_token_ids"]) for item in items]
        past = np.zeros(len(items), np.int64)
        rows = []
        for index in range(64):
            starts = np.cumsum([0, *(len(tokens) for tokens in new)])
            positions = np.concatenate([np.arange(p, p + len(t)) for p, t in zip(past, new, strict=True)])
            rows.append(session.step(np.concatenate(new), positions, starts, past, starts[1:] - 1, [tables]).copy())
            past = past + np.diff(starts)
            new = [np.array([item["token_ids"][index]]) for item in items]
        result.append(np.stack(rows, 1))
    return np.concatenate(result)


def check_half(single: Engine, half: Engine) -> Finding:
    """Logits of float16 are those of float32 within 2e-2 of the row's largest."""
    expected, found = forced_logits(single), forced_logits(half)
    errors = np.abs(found - expected).max(-1) / np.abs(expected).max(-1)
    finite = bool(np.isfinite(found).all())
    agree = (found.argmax(-1) == expected.argmax(-1)).mean()
    return {
        "holds": finite and float(errors.max()) <= HALF_TOLERANCE,
        "worst": float(errors.max()),
        "median": float(np.median(errors)),
        "rows": int(errors.size),
        "same_best_token": float(agree),
    }


def random_params(random: np.random.Generator) -> SamplingParams:
    values: dict[str, Any] = {"max_tokens": int(random.integers(1, 33)), "detokenize": False, "ignore_eos": True}
    kind = random.integers(0, 5)
    if kind >= 1:
        values |= {"temperature": float(random.uniform(0.5, 1.5)), "seed": int(random.integers(0, 1000))}
        values["top_k"] = int(random.choice([0, 2, 8, 40]))
        if random.random() < 0.5:
            values["top_p"] = float(random.uniform(0.3, 1.0))
        values["n"] = int(random.integers(1, 3))
    if kind == 2:
        values |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "no_repeat_ngram_size": 3}
    if kind == 3:
        values |= {"min_p": 0.05, "logprobs": 2}
    return SamplingParams(**values)


def random_requests(seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 140 tokens, many of which begin alike."""
    random = np.random.default_rng(seed)
    prefixes = [random.integers(3, 49000, 100).tolist() for _ in range(3)]
    requests = []
    for _ in range(REQUESTS):
        prefix = prefixes[random.integers(0, 3)][: random.integers(0, 101)]
        prompt = [*prefix, *random.integers(3, 49000, random.integers(1, 40)).tolist()]
        requests.append((prompt, random_params(random)))
    return requests


def tokens_of(output: Any) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


def check_mixed(engine: Engine) -> Finding:
    """200 requests together, with prefixes reused and arrivals at any step, get what each gets alone."""
    requests = random_requests(0)
    with opened(engine, kv_cache_config=KvCacheConfig(enable_block_reuse=False)) as llm:
        begin = time.perf_counter()
        alone = [tokens_of(llm.generate(prompt, params)) for prompt, params in requests]
        alone_seconds = time.perf_counter() - begin
    with opened(engine) as llm:
        random = np.random.default_rng(5)
        begin = time.perf_counter()
        handles: list[Any] = []
        for index, (prompt, params) in enumerate(requests):
            handles.append(llm.generate_async(prompt, params, streaming=bool(index % 2)))
            if random.random() < 0.1:
                handles[random.integers(0, len(handles))].result(120)
        together = [tokens_of(handle.result(120)) for handle in handles]
        seconds = time.perf_counter() - begin
        llm._executor.check()
        parted = [
            _parting(llm, index, requests[index], together[index], alone[index])
            for index in range(len(requests))
            if together[index] != alone[index]
        ]
    return {
        "holds": all(one["near_tie"] for one in parted),
        "requests": len(requests),
        "equal": len(requests) - len(parted),
        "parted": parted,
        "seconds_alone": round(alone_seconds, 2),
        "seconds_together": round(seconds, 2),
    }


def _parting(llm: LLM, index: int, request: Any, found: list[list[int]], expected: list[list[int]]) -> Finding:
    """Where two outputs part, and the gap of the two tokens' logits there; temperature and penalties aside."""
    prompt, params = request
    which = next(i for i, (left, right) in enumerate(zip(found, expected, strict=True)) if left != right)
    left, right = found[which], expected[which]
    at = next(i for i in range(min(len(left), len(right))) if left[i] != right[i])
    again = llm.generate([*prompt, *left[:at]], SamplingParams(max_tokens=1, logprobs=20, detokenize=False))
    top = {token: entry.logprob for token, entry in again.outputs[0].logprobs[0].items()}
    gap = abs(top[left[at]] - top[right[at]]) if left[at] in top and right[at] in top else None
    greedy = params.temperature is None
    return {
        "request": index,
        "at": at,
        "greedy": greedy,
        "gap": gap,
        "near_tie": greedy and gap is not None and gap < NEAR_TIE,
    }


def check_refit(engine: Engine, perturbed: str, fresh: Engine, base: str) -> Finding:
    """Refitted in place, and back: the tokens are those of engines that were built so."""
    with opened(fresh) as llm:
        expected = greedy_tokens(llm)
    with opened(engine) as llm:
        before = greedy_tokens(llm)
        begin = time.perf_counter()
        llm.refit(perturbed)
        seconds = time.perf_counter() - begin
        refitted = greedy_tokens(llm)
        llm.refit(None, base=base, revert=True)
        reverted = greedy_tokens(llm)
    return {
        "holds": refitted == expected and reverted == before and refitted != before,
        "equal_to_a_fresh_build": refitted == expected,
        "equal_after_revert": reverted == before,
        "changes_tokens": refitted != before,
        "seconds": round(seconds, 3),
    }


def check_refit_under_load(engine: Engine, perturbed: str, fresh: Engine) -> Finding:
    """Requests come from four threads while the weights change; none fails, and what comes after is the new model's."""
    with opened(fresh) as llm:
        expected = greedy_tokens(llm)
    found: Finding = {"holds": True}
    for in_flight in ("finish", "recompute"):
        with opened(engine) as llm:
            stop, served, failed = threading.Event(), [0], []

            def load(llm: LLM = llm, stop: Any = stop, served: Any = served, failed: Any = failed) -> None:
                params = SamplingParams(max_tokens=48, ignore_eos=True, detokenize=False)
                while not stop.is_set():
                    try:
                        prompts = [item["prompt_token_ids"] for item in REFERENCE]
                        llm.generate(prompts, params)
                        served[0] += len(prompts)
                    except Exception as error:
                        failed.append(repr(error))
                        return

            threads = [threading.Thread(target=load) for _ in range(4)]
            for thread in threads:
                thread.start()
            time.sleep(0.5)
            begin = time.perf_counter()
            llm.refit(perturbed, in_flight=in_flight)
            seconds = time.perf_counter() - begin
            during = served[0]
            after = greedy_tokens(llm)
            stop.set()
            for thread in threads:
                thread.join()
        holds = after == expected and not failed
        found[in_flight] = {
            "holds": holds, "seconds": round(seconds, 3), "served_meanwhile": during, "served": served[0],
            "failed": failed,
        }  # fmt: skip
        found["holds"] = found["holds"] and holds
    return found


def machine() -> Finding:
    """The GPU, its driver, and the libraries."""
    import importlib.metadata

    from trtllm.runtime.cuda.driver import open_device

    device = open_device()
    versions = {}
    for name in ("tensorrt", "numpy", "cuda-bindings"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = str(getattr(__import__(name), "__version__", "?")) if name != "cuda-bindings" else "?"
    return {
        "gpu": device.name,
        "compute_capability": device.compute_capability,
        "driver_cuda": device.driver_version,
        "python": sys.version.split()[0],
        **versions,
    }


def run(name: str, check: Callable[[], Finding], results: dict[str, Finding]) -> None:
    begin = time.perf_counter()
    try:
        results[name] = check()
    except Exception as error:
        traceback.print_exc()
        results[name] = {"holds": False, "error": f"{type(error).__name__}: {error}"}
    results[name]["check_seconds"] = round(time.perf_counter() - begin, 2)
    print(name, json.dumps(results[name]), flush=True)


def main() -> None:
    """Runs the checks and writes their findings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fp32", type=Path, required=True, help="engine directory, float32")
    parser.add_argument("--fp16", type=Path, help="engine directory, float16")
    parser.add_argument("--perturbed", help="a checkpoint with other weights, or a package that holds it")
    parser.add_argument("--perturbed-engine", type=Path, help="a float32 engine of it")
    parser.add_argument("--base", help="the model that the engines were built from")
    parser.add_argument("--json", type=Path, help="where the findings go")
    arguments = parser.parse_args()
    single = open_engine(arguments.fp32)
    results: dict[str, Finding] = {}
    run("greedy", lambda: check_greedy(single), results)
    run("mixed", lambda: check_mixed(single), results)
    if arguments.fp16:
        half = open_engine(arguments.fp16)
        run("half", lambda: check_half(single, half), results)
        run("mixed_half", lambda: {**check_mixed(half), "criterion": "reported only"}, results)
    if arguments.perturbed and arguments.perturbed_engine and arguments.base:
        fresh = open_engine(arguments.perturbed_engine)
        run("refit", lambda: check_refit(single, arguments.perturbed, fresh, arguments.base), results)
        run("refit_under_load", lambda: check_refit_under_load(single, arguments.perturbed, fresh), results)
    report = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "checks": results,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(not all(finding["holds"] for finding in results.values() if "criterion" not in finding))


if __name__ == "__main__":
    main()
