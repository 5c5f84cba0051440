"""Requests on a TensorRT engine: what each gets is what it gets alone on a CPU, whatever else is under way."""

import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm import LLM, SamplingParams
from trtllm.compiler.engine import Engine
from trtllm.errors import TargetError, TrtllmError, UsageError
from trtllm.runtime.llm_config import KvCacheConfig, NGramDecodingConfig, SchedulerConfig

REQUESTS = 200
NO_REUSE = KvCacheConfig(enable_block_reuse=False)


def random_params(random: np.random.Generator) -> SamplingParams:
    """Greedy, sampled, penalized, with log probabilities, and limited by stop tokens."""
    values: dict[str, Any] = {"max_tokens": int(random.integers(1, 24)), "detokenize": False}
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
    if kind == 4:
        values |= {"min_tokens": min(4, values["max_tokens"]), "top_k": 6}
    if random.random() < 0.3:
        values["stop_token_ids"] = random.integers(0, 300, 3).tolist()
    return SamplingParams(**values)


def random_requests(seed: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 70 tokens, many of which begin alike."""
    random = np.random.default_rng(seed)
    prefixes = [random.integers(3, 250, 50).tolist() for _ in range(3)]
    requests = []
    for _ in range(REQUESTS):
        prefix = prefixes[random.integers(0, 3)][: random.integers(0, 51)]
        prompt = [*prefix, *random.integers(3, 250, random.integers(1, 20)).tolist()]
        requests.append((prompt, random_params(random)))
    return requests


def tokens_of(output: Any) -> list[tuple[list[int], str | None]]:
    return [(completion.token_ids, completion.finish_reason) for completion in output.outputs]


@pytest.fixture(scope="module")
def alone(padded_engines: dict[bool, Engine]) -> list[Any]:
    """What each request gets on a CPU when nothing else runs and nothing is reused."""
    with LLM(padded_engines[False], threads=1, skip_tokenizer_init=True, kv_cache_config=NO_REUSE) as llm:
        return [tokens_of(llm.generate(prompt, params)) for prompt, params in random_requests(0)]


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "small chunks, equal progress": {
        "max_num_tokens": 24,
        "scheduler_config": SchedulerConfig(context_chunking_policy="EQUAL_PROGRESS"),
    },
    "a small cache that pauses requests": {
        "scheduler_config": SchedulerConfig(capacity_scheduler_policy="MAX_UTILIZATION"),
        "kv_cache_config": KvCacheConfig(max_tokens=224),
    },
    "offloading to the host": {"kv_cache_config": KvCacheConfig(max_tokens=224, host_cache_size=1 << 18)},
    "guesses by n-grams": {"speculative_config": NGramDecodingConfig(max_draft_len=3), "gathers_all": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_hundred_random_requests_get_together_what_each_gets_alone_on_a_cpu(
    name: str, gathered_engines: dict[bool, Engine], fake_gpu: Any, alone: list[Any]
) -> None:
    arguments = dict(SETTINGS[name])
    requests = random_requests(0)
    with LLM(gathered_engines[arguments.pop("gathers_all", False)], skip_tokenizer_init=True, **arguments) as llm:
        random = np.random.default_rng(5)
        cancelled = set(random.choice(len(requests), 20, replace=False).tolist())
        handles: list[Any] = []
        for index, (prompt, params) in enumerate(requests):
            handles.append(llm.generate_async(prompt, params, streaming=bool(index % 2)))
            if index in cancelled:
                threading.Timer(float(random.uniform(0, 0.5)), handles[-1].abort).start()
            if random.random() < 0.1:  # arrivals at different steps
                handles[random.integers(0, len(handles))].result(60)
        outputs = [tokens_of(handle.result(120)) for handle in handles]
        llm._executor.check()
    for index, (found, expected) in enumerate(zip(outputs, alone, strict=True)):
        if index not in cancelled:
            assert found == expected, f"request {index}: {requests[index]}"
        else:
            assert all(whole[: len(part)] == part for (part, _), (whole, _) in zip(found, expected, strict=False))
    assert fake_gpu.counts["graph"] > 100


def test_one_prefix_is_computed_once(gathered_engines: dict[bool, Engine], fake_gpu: Any) -> None:
    prompt = np.random.default_rng(3).integers(3, 250, 40).tolist()
    with LLM(gathered_engines[False], skip_tokenizer_init=True) as llm:
        params = SamplingParams(max_tokens=4, return_perf_metrics=True)
        first = llm.generate(prompt, params)
        second = llm.generate([*prompt[:32], 7, 8], params)
        third = llm.generate(prompt, params)
    assert first.outputs[0].token_ids == third.outputs[0].token_ids
    assert second.outputs[0].request_perf_metrics["num_reused_blocks"] >= 4


@pytest.fixture
def refused(gathered_engines: dict[bool, Engine], tmp_path: Path) -> Any:
    """The error of an engine whose manifest says something else."""

    def open_one(**target: Any) -> TrtllmError:
        engine = gathered_engines[False]
        manifest = replace(engine.manifest, target=replace(engine.manifest.target, **target))
        with pytest.raises(TrtllmError) as caught:
            LLM(replace(engine, manifest=manifest), skip_tokenizer_init=True)
        assert str(caught.value).count("\n") == 1
        return caught.value

    return open_one


def test_what_this_machine_cannot_run_is_refused_in_two_lines(
    refused: Any, fake_gpu: Any, fake_cuda: Any, fake_tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refused(version="8.6.1")
    assert "was built with TensorRT 8.6.1, installed is 8.6.0" in error.what
    assert "tensorrt==8.6.1" in error.hint
    assert error.exit_code == 5
    assert "built for compute capability 8.0, 8.9, Fake GPU has 9.0" in refused(compute_capabilities=("80", "89")).what
    assert "'tensorrt-x', which is not known here" in refused(flavour="tensorrt-x").what
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake_tensorrt.module(fake_gpu))
    assert "TensorRT-RTX does not run on Fake GPU (compute capability 9.0)" in refused(flavour="tensorrt-rtx").what
    fake_gpu.driver_version = 11080
    assert "knows CUDA 11.8, TensorRT 8.6.0 needs 12.0" in refused().what
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    error = refused()
    assert "needs TensorRT 8.6.0, which is not installed" in error.what
    assert error.hint == "pip install 'tensorrt==8.6.0'"


def test_a_plan_that_the_library_refuses_says_why(
    refused: Any, fake_gpu: Any, fake_tensorrt: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module(fake_gpu, "8.6.1"))
    error = refused(version="8.6.1")
    assert "cannot load" in error.what and "Version tag does not match" in error.what


def test_a_machine_without_a_driver_or_its_bindings_says_so(
    gathered_engines: dict[bool, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(TargetError, match=r"needs cuda-bindings.*\n.*pip install"):
        LLM(gathered_engines[False], skip_tokenizer_init=True)


def test_a_plan_whose_cache_is_its_own_is_no_engine_for_the_llm(gathered_engines: dict[bool, Engine]) -> None:
    engine = gathered_engines[False]
    config = {**engine.config, "cache": {**engine.config["cache"], "kind": "linear"}}
    with pytest.raises(TargetError, match="of a form that has no session: its cache is linear"):
        LLM(replace(engine, config=config), skip_tokenizer_init=True)


def test_limits_beyond_the_plan_are_refused(gathered_engines: dict[bool, Engine], fake_gpu: Any) -> None:
    with pytest.raises(UsageError, match="built for 40 of 8"):
        LLM(gathered_engines[False], skip_tokenizer_init=True, kv_cache_config=KvCacheConfig(tokens_per_block=16))
