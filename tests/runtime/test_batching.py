"""In-flight batching on real engines: what a request gets never depends on what else is under way."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm import LLM, SamplingParams
from trtllm.compiler.engine import Engine
from trtllm.runtime.llm_config import KvCacheConfig, NGramDecodingConfig, SchedulerConfig

POLICIES = ("GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH")
CHUNKING = ("FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS")
REQUESTS = 200


@pytest.fixture(scope="module")
def tiny_smollm2(synthetic: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of SmolLM2's shape (9 query heads on 3 cache heads) made small, with weights that tell tokens apart."""
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference model needs transformers")
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=72,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=256,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.35,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-smollm2"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def build(model: Path, folder: Path, level: int) -> Engine:
    from trtllm import BuildConfig, compile

    config = BuildConfig(optimization_level=level, max_batch_size=8, max_seq_len=160, max_num_tokens=192)
    return compile(model, output_dir=folder, config=config)


@pytest.fixture(scope="module")
def engines(tiny_smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """The packed form, whose cache is paged, and the form whose cache has one slot a sequence."""
    folder = tmp_path_factory.mktemp("engines")
    return {"paged": build(tiny_smollm2, folder / "paged", 2), "linear": build(tiny_smollm2, folder / "linear", 1)}


def random_params(random: np.random.Generator) -> SamplingParams:
    values: dict[str, Any] = {"max_tokens": int(random.integers(1, 24)), "detokenize": False}
    kind = random.integers(0, 4)
    if kind >= 1:
        values |= {"temperature": float(random.uniform(0.5, 1.5)), "seed": int(random.integers(0, 1000))}
        values["top_k"] = int(random.choice([0, 2, 8, 40]))
        if random.random() < 0.5:
            values["top_p"] = float(random.uniform(0.5, 1.0))
        values["n"] = int(random.integers(1, 3))
    if kind == 2:
        values |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "no_repeat_ngram_size": 3}
    if kind == 3:
        values |= {"min_p": 0.05, "logprobs": 2}
    if random.random() < 0.3:
        values["stop_token_ids"] = random.integers(0, 320, 3).tolist()
    return SamplingParams(**values)


def random_requests(seed: int, count: int = REQUESTS) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 120 tokens, many of which begin alike."""
    random = np.random.default_rng(seed)
    prefixes = [random.integers(3, 320, 80).tolist() for _ in range(3)]
    requests = []
    for _ in range(count):
        prefix = prefixes[random.integers(0, 3)][: random.integers(0, 81)]
        prompt = [*prefix, *random.integers(3, 320, random.integers(1, 40)).tolist()]
        requests.append((prompt, random_params(random)))
    return requests


def tokens_of(output: Any) -> list[tuple[list[int], str | None]]:
    return [(completion.token_ids, completion.finish_reason) for completion in output.outputs]


@pytest.fixture(scope="module")
def alone(engines: dict[str, Engine]) -> list[Any]:
    """What each request gets when nothing else runs and nothing is reused."""
    with LLM(engines["paged"], threads=1, skip_tokenizer_init=True, kv_cache_config=NO_REUSE) as llm:
        return [tokens_of(llm.generate(prompt, params)) for prompt, params in random_requests(0)]


NO_REUSE = KvCacheConfig(enable_block_reuse=False)
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("paged", {}),
    "small chunks, equal progress": (
        "paged",
        {"max_num_tokens": 48, "scheduler_config": SchedulerConfig(context_chunking_policy="EQUAL_PROGRESS")},
    ),
    "a small cache that pauses requests": (
        "paged",
        {
            "scheduler_config": SchedulerConfig(capacity_scheduler_policy="MAX_UTILIZATION"),
            "kv_cache_config": KvCacheConfig(max_tokens=480, tokens_per_block=16),
        },
    ),
    "static batches": ("paged", {"scheduler_config": SchedulerConfig(capacity_scheduler_policy="STATIC_BATCH")}),
    "offloading to the host": ("paged", {"kv_cache_config": KvCacheConfig(max_tokens=700, host_cache_size=1 << 22)}),
    "guesses by n-grams": ("paged", {"speculative_config": NGramDecodingConfig(max_draft_len=3)}),
    "a slot for each sequence": ("linear", {}),
    "slots, small chunks": ("linear", {"max_num_tokens": 40}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_two_hundred_random_requests_get_together_what_each_gets_alone(
    name: str, engines: dict[str, Engine], alone: list[Any]
) -> None:
    kind, arguments = SETTINGS[name]
    requests = random_requests(0)
    with LLM(engines[kind], threads=2, skip_tokenizer_init=True, **arguments) as llm:
        handles: list[Any] = []
        random = np.random.default_rng(5)
        cancelled = set(random.choice(len(requests), 20, replace=False).tolist())
        for index, (prompt, params) in enumerate(requests):
            handles.append(llm.generate_async(prompt, params, streaming=bool(index % 2)))
            if index in cancelled:
                threading.Timer(float(random.uniform(0, 0.5)), handles[-1].abort).start()
            if random.random() < 0.1:  # arrivals at different steps
                handles[random.integers(0, len(handles))].result(60)
        outputs = [tokens_of(handle.result(120)) for handle in handles]
        for index, (found, expected) in enumerate(zip(outputs, alone, strict=True)):
            if index in cancelled:
                for (tokens, reason), (whole, _) in zip(found, expected, strict=False):
                    assert reason in ("cancelled", "stop", "length")
                    assert tokens == whole[: len(tokens)]
            else:
                assert found == expected, f"request {index} of {requests[index]}"
        llm.check()  # every block came back


def test_a_long_shared_prompt_is_computed_once(engines: dict[str, Engine]) -> None:
    prompt = np.random.default_rng(1).integers(3, 320, 120).tolist()
    for kind in engines:
        with LLM(engines[kind], threads=1, skip_tokenizer_init=True) as llm:
            params = SamplingParams(max_tokens=4, ignore_eos=True, detokenize=False, return_perf_metrics=True)
            first = llm.generate([*prompt, 5], params)
            second = llm.generate([*prompt, 6], params)
            metrics = [each.outputs[0].request_perf_metrics for each in (first, second)]
            computed = [each["num_computed_prompt_tokens"] for each in metrics]
            assert computed == [121, 1], kind
            with LLM(engines[kind], threads=1, skip_tokenizer_init=True, kv_cache_config=NO_REUSE) as fresh:
                assert tokens_of(fresh.generate([*prompt, 6], params)) == tokens_of(second)


def test_prompt_logits_are_those_of_the_reference(tiny_smollm2: Path, engines: dict[str, Engine]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_smollm2).eval()
    prompt = np.random.default_rng(2).integers(3, 320, 100).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    logprobs = torch.log_softmax(expected, -1).numpy()
    params = SamplingParams(max_tokens=2, prompt_logprobs=3, return_context_logits=True, detokenize=False)
    with LLM(engines["paged"], threads=1, skip_tokenizer_init=True, max_num_tokens=48) as llm:
        output = llm.generate(prompt, params)
    # float32 through 3 layers: rounding of about sqrt(72) terms at each of some 20 products, of logits below 30.
    tolerance = 30 * 2**-23 * 72**0.5 * 20
    assert np.abs(output.context_logits - expected.numpy()).max() < tolerance
    found = output.outputs[0].prompt_logprobs
    assert len(found) == 99  # nothing comes before the first token
    for place in range(1, 100):
        entry = found[place - 1][prompt[place]]
        assert abs(entry.logprob - logprobs[place - 1, prompt[place]]) < 2 * tolerance


@pytest.mark.parametrize(
    ("width", "options"),
    [
        (2, {}),
        (4, {"length_penalty": 1.0}),
        (3, {"early_stopping": 0, "length_penalty": 0.5}),
        (3, {"early_stopping": 2}),
        (4, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}),
    ],
)
def test_beam_search_finds_what_transformers_finds(
    tiny_smollm2: Path, engines: dict[str, Engine], width: int, options: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_smollm2).eval()
    early = {0: False, 1: True, 2: "never"}[options.get("early_stopping", 1)]
    reference = {key: value for key, value in options.items() if key not in ("early_stopping", "length_penalty")}
    for kind, engine in engines.items():
        with LLM(engine, threads=1, skip_tokenizer_init=True, max_beam_width=4) as llm:
            for seed in range(3):
                prompt = np.random.default_rng(seed).integers(3, 320, 12).tolist()
                ids = torch.tensor([prompt])
                expected = model.generate(
                    ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width,
                    do_sample=False, max_new_tokens=16, early_stopping=early, eos_token_id=[2, 9, 77], pad_token_id=0,
                    length_penalty=options.get("length_penalty", 0.0), **reference,
                )  # fmt: skip
                params = SamplingParams(
                    n=width, best_of=width, use_beam_search=True, max_tokens=16, end_id=2, stop_token_ids=[9, 77],
                    detokenize=False, **options,
                )  # fmt: skip
                found = [completion.token_ids for completion in llm.generate(prompt, params).outputs]
                ends = {0, 2, 9, 77}
                wanted = [
                    [token for place, token in enumerate(row) if not ends & set(row[: place + 1])]
                    for row in expected[:, len(prompt) :].tolist()
                ]
                assert found == wanted, (kind, seed)
            llm.check()


def test_a_draft_engine_changes_nothing_but_the_number_of_steps(
    engines: dict[str, Engine], tiny_llama_engine: Path
) -> None:
    from trtllm.runtime.llm_config import DraftTargetDecodingConfig

    requests = random_requests(4, 30)
    with LLM(engines["paged"], threads=1, skip_tokenizer_init=True) as llm:
        expected = [tokens_of(llm.generate(prompt, params)) for prompt, params in requests]
    draft = DraftTargetDecodingConfig(max_draft_len=3, speculative_model=engines["paged"].path)
    with LLM(engines["paged"], threads=1, skip_tokenizer_init=True, speculative_config=draft) as llm:
        handles = [llm.generate_async(prompt, params) for prompt, params in requests]
        assert [tokens_of(handle.result(60)) for handle in handles] == expected
        stats = llm.get_stats()
        accepted = sum(step["specDecodingStats"]["numAcceptedTokens"] for step in stats)
        assert accepted > 0  # the model guesses itself right when it is greedy
        llm.check()
