"""Generation on a tiny engine: equal to transformers, alone and in a batch; limits and misuse are answered clearly."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm import (
    LLM,
    BuildCacheConfig,
    DraftTargetDecodingConfig,
    GuidedDecodingParams,
    KvCacheConfig,
    NGramDecodingConfig,
    SamplingParams,
    SchedulerConfig,
)
from trtllm.errors import BadInputError, TrtllmError, UsageError

NO_SPACES = dict.fromkeys(range(188, 256), -100.0)
"""Byte-level tokens of control characters and white space, which JSON allows without end."""
IGNORE_EOS = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_llama_engine: Path) -> Any:
    with LLM(tiny_llama_engine, threads=1) as loaded:
        yield loaded


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.integers(1, 30)).tolist() for _ in range(count)]


def test_greedy_tokens_equal_those_of_transformers(llm: LLM, tiny_llama_directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_directory).eval()
    for prompt in prompts(5):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, eos_token_id=None)
        generated = llm.generate(prompt, IGNORE_EOS).outputs[0]
        assert generated.token_ids == expected[0, len(prompt) :].tolist()


def test_a_batch_larger_than_the_slots_gives_each_prompt_what_it_gets_alone(llm: LLM) -> None:
    many = prompts(11, seed=3)
    params = [SamplingParams(max_tokens=3 + index, ignore_eos=True) for index in range(len(many))]
    together = llm.generate(many, params)
    alone = [llm.generate(prompt, param) for prompt, param in zip(many, params, strict=True)]
    assert [output.outputs[0].token_ids for output in together] == [output.outputs[0].token_ids for output in alone]
    assert [output.prompt_token_ids for output in together] == many
    assert [output.outputs[0].length for output in together] == [param.max_tokens for param in params]


def test_the_same_seed_gives_the_same_sample_whatever_the_batch(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.5, top_k=40, top_p=0.95, seed=5, ignore_eos=True)
    prompt, others = prompts(1, seed=9)[0], prompts(4, seed=10)
    alone = llm.generate(prompt, params).outputs[0].token_ids
    batched = llm.generate([*others[:2], prompt, *others[2:]], params)[2].outputs[0].token_ids
    assert alone == batched
    other_seed = SamplingParams(max_tokens=10, temperature=1.5, top_k=40, top_p=0.95, seed=6, ignore_eos=True)
    assert llm.generate(prompt, other_seed).outputs[0].token_ids != alone


def test_a_stop_token_ends_the_sequence_and_is_not_part_of_it(llm: LLM) -> None:
    prompt = prompts(1)[0]
    tokens = llm.generate(prompt, IGNORE_EOS).outputs[0].token_ids
    stopped = llm.generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=[tokens[4]]))
    first = tokens.index(tokens[4])
    assert stopped.outputs[0].token_ids == tokens[:first]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", tokens[4])


def test_a_stop_string_ends_the_text_before_it_or_after_it(llm: LLM) -> None:
    prompt = "hello"
    text = llm.generate(prompt, IGNORE_EOS).outputs[0].text
    position = next(index for index in range(2, len(text)) if text[index] not in text[:index] and text[index].isascii())
    stop = text[position]
    cut = llm.generate(prompt, SamplingParams(max_tokens=12, ignore_eos=True, stop=stop)).outputs[0]
    kept = llm.generate(
        prompt, SamplingParams(max_tokens=12, ignore_eos=True, stop=[stop], include_stop_str_in_output=True)
    ).outputs[0]
    assert cut.text == text[:position]
    assert kept.text == text[: position + 1]
    assert cut.finish_reason == "stop"
    assert cut.stop_reason == stop


def test_generation_ends_where_the_cache_ends(llm: LLM) -> None:
    output = llm.generate(list(range(90)), SamplingParams(max_tokens=50, ignore_eos=True)).outputs[0]
    assert output.length == 6
    assert output.finish_reason == "length"


def test_chat_goes_through_the_template_and_takes_one_conversation_or_several(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    one = llm.chat(conversation, IGNORE_EOS)
    assert one.prompt_token_ids == llm.tokenizer.encode("<user>hi<assistant>", add_special_tokens=False)
    several = llm.chat([conversation, conversation], IGNORE_EOS)
    assert [output.outputs[0].token_ids for output in several] == [one.outputs[0].token_ids] * 2


def test_prompts_come_as_text_ids_or_dicts(llm: LLM) -> None:
    ids = llm.tokenizer.encode("abc")
    outputs = llm.generate(["abc", ids, {"prompt": "abc"}, {"prompt_token_ids": ids}], IGNORE_EOS)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert outputs[0].prompt == "abc"
    assert llm.generate([], IGNORE_EOS) == []


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "empty"),
        ("", "empty"),
        (list(range(96)), "96 tokens, the engine takes 95"),
        ([5, 300], "token id 300 is outside the vocabulary of 300"),
        ([5, -1], "token id -1"),
        ({"text": "x"}, "neither 'prompt' nor 'prompt_token_ids'"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(llm: LLM, prompt: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        llm.generate([prompt], IGNORE_EOS)


@pytest.mark.parametrize(
    "values", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": -0.1}, {"top_p": 1.1}]
)
def test_sampling_params_out_of_range_are_refused_by_name(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        SamplingParams(**values)  # type: ignore[arg-type]


def test_sampling_params_must_match_the_prompts(llm: LLM) -> None:
    with pytest.raises(UsageError, match="2 prompts but 3 sampling params"):
        llm.generate([[1], [2]], [IGNORE_EOS] * 3)


def test_a_shut_down_llm_says_so(tiny_llama_engine: Path) -> None:
    with LLM(tiny_llama_engine, threads=1) as loaded:
        pass
    with pytest.raises(UsageError, match="shut down"):
        loaded.generate([1])


def test_what_is_neither_engine_nor_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no model"):
        LLM(tmp_path)


def test_a_model_is_built_through_the_cache_and_found_there(tiny_llama_directory: Path, tmp_path: Path) -> None:
    cache = BuildCacheConfig(cache_root=tmp_path)
    outputs = []
    for _ in range(2):
        with LLM(tiny_llama_directory, threads=1, max_seq_len=96, max_batch_size=3, enable_build_cache=cache) as llm:
            outputs.append(llm.generate([1, 2, 3], IGNORE_EOS).outputs[0].token_ids)
    assert outputs[0] == outputs[1]
    assert len(list(tmp_path.glob("*/engine/manifest.json"))) == 1


def test_streams_add_up_to_the_text_and_stop_strings_never_show(llm: LLM) -> None:
    whole = llm.generate("hello", IGNORE_EOS).outputs[0]
    pieces = [output.outputs[0].text_diff for output in llm.stream("hello", IGNORE_EOS)]
    assert "".join(pieces) == whole.text
    stop = whole.text[3:5]
    params = SamplingParams(max_tokens=12, ignore_eos=True, stop=stop)
    text = ""
    for output in llm.stream("hello", params):
        text += output.outputs[0].text_diff
        assert stop not in text
    assert text == whole.text[: whole.text.index(stop)]


def test_leaving_a_stream_frees_its_place(llm: LLM) -> None:
    for _ in range(20):
        for _output in llm.stream([1, 2, 3], SamplingParams(max_tokens=80, ignore_eos=True)):
            break
    assert llm.generate([1, 2], IGNORE_EOS).outputs[0].length == 12
    llm._executor.check()


def test_many_coroutines_and_threads_get_what_each_gets_alone(llm: LLM) -> None:
    many = prompts(24, seed=5)
    alone = [output.outputs[0].token_ids for output in llm.generate(many, IGNORE_EOS)]

    async def ask(prompt: list[int]) -> list[int]:
        handle = llm.generate_async(prompt, IGNORE_EOS, streaming=True)
        return [token async for output in handle for token in output.outputs[0].token_ids_diff]

    async def ask_all() -> list[list[int]]:
        return await asyncio.gather(*map(ask, many))

    with ThreadPoolExecutor(4) as pool:
        in_loops = [pool.submit(lambda: asyncio.run(ask_all())) for _ in range(2)]
        in_threads = [pool.submit(lambda prompt=prompt: llm.generate(prompt, IGNORE_EOS)) for prompt in many]
        assert [future.result(60) for future in in_loops] == [alone, alone]
        assert [future.result(60).outputs[0].token_ids for future in in_threads] == alone


def test_a_batch_takes_prompts_as_it_goes_and_returns_errors_in_their_place(llm: LLM) -> None:
    taken = 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        while True:
            taken += 1
            yield [taken % 200 + 1] if taken % 7 else []

    results = llm.batch(endless(), SamplingParams(max_tokens=2, ignore_eos=True), max_in_flight=5, on_error="return")
    for index in range(1, 40):
        output = next(results)
        assert taken <= index + 5
        if index % 7:
            assert output.prompt_token_ids == [index % 200 + 1] and output.error is None
        else:
            assert isinstance(output.error, UsageError)
    results.close()
    with pytest.raises(UsageError, match="empty"):
        list(llm.batch([[1], []]))


def test_several_sequences_are_different_and_the_best_are_returned(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=2.0, n=2, best_of=3, logprobs=0)
    outputs = llm.generate([1, 2, 3], params).outputs
    assert len(outputs) == 2
    assert outputs[0].cumulative_logprob >= outputs[1].cumulative_logprob
    assert outputs[0].token_ids != outputs[1].token_ids
    for output in outputs:
        total = sum(entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True))
        assert output.cumulative_logprob == pytest.approx(total, abs=1e-4)


def test_log_probabilities_are_those_of_transformers(llm: LLM, tiny_llama_directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_directory).eval()
    prompt = prompts(1, seed=4)[0]
    params = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1, return_generation_logits=True)
    output = llm.generate(prompt, params).outputs[0]
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([[*prompt, *output.token_ids]])).logits[0].double(), -1).numpy()
    for place, (token, entry) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        row = expected[len(prompt) - 1 + place]
        assert len(entry) == 2 and entry[token].rank == 1
        for other, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[other], abs=1e-3)
    for place, entry in enumerate(output.prompt_logprobs):
        assert entry[prompt[place + 1]].logprob == pytest.approx(expected[place][prompt[place + 1]], abs=1e-3)
    assert output.generation_logits is not None and output.generation_logits.shape == (6, 300)
    assert output.generation_logits.argmax(1).tolist() == output.token_ids


def test_logits_processors_and_biases_change_what_is_chosen(llm: LLM) -> None:
    def only_seven(request_id: int, sequence: int, tokens: list[int], logits: np.ndarray) -> None:
        logits[:] = -np.inf
        logits[7] = 0.0

    params = SamplingParams(max_tokens=4, ignore_eos=True, logits_processor=only_seven)
    assert llm.generate([1, 2], params).outputs[0].token_ids == [7] * 4
    biased = SamplingParams(max_tokens=4, ignore_eos=True, logit_bias={9: 1000.0})
    assert llm.generate([1, 2], biased).outputs[0].token_ids == [9] * 4


def test_a_processor_that_fails_fails_its_own_request(llm: LLM) -> None:
    def failing(*_: Any) -> None:
        raise ValueError("no idea")

    broken = llm.generate_async([1, 2], SamplingParams(logits_processor=failing))
    healthy = llm.generate_async([1, 2], IGNORE_EOS)
    with pytest.raises(TrtllmError, match="no idea"):
        broken.result(30)
    assert healthy.result(30).outputs[0].length == 12


def test_guided_output_is_valid(llm: LLM) -> None:
    pytest.importorskip("llguidance", reason="guided decoding needs llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    guided = GuidedDecodingParams(json=schema)
    for seed in range(4):
        params = SamplingParams(max_tokens=60, temperature=0.5, seed=seed, guided_decoding=guided, logit_bias=NO_SPACES)
        output = llm.generate("x", params).outputs[0]
        assert output.finish_reason == "stop"
        document = json.loads(output.text)
        assert set(document) == {"a", "b"}
    with pytest.raises(UsageError, match="Unsatisfiable"):
        llm.generate("x", SamplingParams(guided_decoding=GuidedDecodingParams(json={"enum": []})))
    assert llm.generate("x", IGNORE_EOS).outputs[0].length == 12


def test_beam_search_finds_at_least_what_greedy_finds(tiny_llama_engine: Path) -> None:
    with LLM(tiny_llama_engine, threads=1, max_beam_width=4, max_batch_size=3) as llm:
        params = SamplingParams(max_tokens=6, ignore_eos=True, use_beam_search=True, best_of=3, n=2, logprobs=0)
        beams = llm.generate([1, 2, 3], params).outputs
        greedy = llm.generate([1, 2, 3], SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)).outputs[0]
        assert len(beams) == 2 and beams[0].token_ids != beams[1].token_ids
        assert beams[0].cumulative_logprob >= beams[1].cumulative_logprob
        assert beams[0].cumulative_logprob >= greedy.cumulative_logprob - 1e-4
        with pytest.raises(UsageError, match="cannot stream"):
            llm.generate_async([1], params, streaming=True)


def test_drafting_by_ngrams_changes_nothing_but_the_speed(tiny_llama_engine: Path, llm: LLM) -> None:
    many = [prompt * 3 for prompt in prompts(5, seed=8) if len(prompt) < 20]
    plain = llm.generate(many, IGNORE_EOS)
    with LLM(tiny_llama_engine, threads=1, speculative_config=NGramDecodingConfig()) as drafting:
        drafted = drafting.generate(many, IGNORE_EOS)
    assert [output.outputs[0].token_ids for output in drafted] == [output.outputs[0].token_ids for output in plain]


def test_a_draft_model_changes_nothing_but_the_speed(tiny_llama_engine: Path, llm: LLM) -> None:
    many = prompts(4, seed=12)
    config = DraftTargetDecodingConfig(speculative_model=tiny_llama_engine, max_draft_len=3)
    with LLM(tiny_llama_engine, threads=1, speculative_config=config) as drafting:
        drafted = drafting.generate(many, SamplingParams(max_tokens=12, ignore_eos=True, return_perf_metrics=True))
    plain = llm.generate(many, IGNORE_EOS)
    assert [output.outputs[0].token_ids for output in drafted] == [output.outputs[0].token_ids for output in plain]
    metrics = drafted[0].outputs[0].request_perf_metrics
    assert metrics is not None and metrics["total_accepted_draft_tokens"] == metrics["total_draft_tokens"] > 0


def test_statistics_events_and_the_trace_can_be_had(tiny_llama_engine: Path, tmp_path: Path) -> None:
    cache = KvCacheConfig(event_buffer_max_size=100)
    with LLM(
        tiny_llama_engine, threads=1, kv_cache_config=cache, request_stats_max_iterations=10, perf_trace_max_events=100
    ) as llm:
        llm.generate([1] * 40, IGNORE_EOS)
        stats = llm.get_stats()
        assert stats and stats[0]["iterLatencyMS"] >= 0 and stats[-1]["kvCacheStats"]["tokensPerBlock"] > 0
        assert asyncio.run(llm.get_stats_async(0)) == []
        assert llm.get_request_stats()
        assert llm.get_kv_cache_events()
        assert json.loads(llm.export_trace(tmp_path / "trace.json").read_text())
    with LLM(tiny_llama_engine, threads=1) as llm, pytest.raises(UsageError, match="perf_trace_max_events"):
        llm.export_trace(tmp_path / "none.json")


def test_time_runs_out_and_requests_are_aborted(llm: LLM) -> None:
    long = SamplingParams(max_tokens=90, ignore_eos=True)
    slow = SamplingParams(max_tokens=90, ignore_eos=True, logits_processor=lambda *_: time.sleep(0.02))
    limited = llm.generate_async([1], slow, allotted_time_ms=100).result(30).outputs[0]
    assert limited.finish_reason == "timeout" and limited.length < 90
    handle = llm.generate_async([1], slow)
    handle.abort()
    assert handle.result(30).outputs[0].finish_reason == "cancelled"
    assert llm.generate([1], long).outputs[0].length == 90


def test_salts_keep_caches_apart(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2, ignore_eos=True, return_perf_metrics=True)
    prompt = [11] * 80

    def reused(salt: str) -> int:
        metrics = llm.generate(prompt, params, cache_salt=salt).outputs[0].request_perf_metrics
        assert metrics is not None
        return int(metrics["num_reused_tokens"])

    assert [reused("a"), reused("b")] == [0, 0]
    assert reused("a") > 0


def test_a_copy_of_the_engine_is_the_engine(llm: LLM, tmp_path: Path) -> None:
    saved = llm.save(tmp_path / "copy")
    with LLM(saved, threads=1) as copy:
        assert copy.generate("hi", IGNORE_EOS).outputs[0].text == llm.generate("hi", IGNORE_EOS).outputs[0].text
        assert copy.workspace == saved
    with pytest.raises(UsageError, match="exists"):
        llm.save(saved)


def test_limits_of_the_engine_can_be_lowered_but_not_raised(tiny_llama_engine: Path) -> None:
    with LLM(tiny_llama_engine, threads=1, max_seq_len=20) as llm:
        assert llm.generate([1] * 10, SamplingParams(max_tokens=50, ignore_eos=True)).outputs[0].length == 10
        with pytest.raises(UsageError, match="20 tokens, the engine takes 19"):
            llm.generate([1] * 20)
    with pytest.raises(UsageError, match="max_seq_len 200 exceeds the 96"):
        LLM(tiny_llama_engine, max_seq_len=200)


def test_a_short_queue_refuses_single_requests_but_serves_lists(tiny_llama_engine: Path) -> None:
    with LLM(tiny_llama_engine, threads=1, scheduler_config=SchedulerConfig(max_queue_size=2)) as llm:
        assert len(llm.generate(prompts(12), IGNORE_EOS)) == 12
        slow = SamplingParams(max_tokens=90, ignore_eos=True, logits_processor=lambda *_: time.sleep(0.01))
        handles = []

        def flood() -> None:
            for _ in range(20):
                handles.append(llm.generate_async([1], slow))  # noqa: PERF401  # an error ends it

        with pytest.raises(UsageError, match="queue"):
            flood()
        for handle in handles:
            handle.abort()
        assert {handle.result(30).outputs[0].finish_reason for handle in handles} == {"cancelled"}


def test_without_a_tokenizer_token_ids_go_in_and_out(tiny_llama_engine: Path, llm: LLM) -> None:
    with LLM(tiny_llama_engine, threads=1, skip_tokenizer_init=True) as bare:
        output = bare.generate([1, 2, 3], IGNORE_EOS).outputs[0]
        assert output.token_ids == llm.generate([1, 2, 3], IGNORE_EOS).outputs[0].token_ids
        assert output.text == ""
        with pytest.raises(UsageError, match="skip_tokenizer_init"):
            bare.tokenize("x")


def test_a_shutdown_waits_for_requests_or_ends_them(tiny_llama_engine: Path) -> None:
    for finish, reason in ((True, "length"), (False, "cancelled")):
        llm = LLM(tiny_llama_engine, threads=1)
        params = SamplingParams(max_tokens=80, ignore_eos=True, logits_processor=lambda *_: time.sleep(0.002))
        handles = [llm.generate_async([1, 2], params) for _ in range(6)]
        llm.shutdown(finish=finish)
        assert {handle.result(0).outputs[0].finish_reason for handle in handles} == {reason}
        llm.shutdown()


def test_an_encoder_embeds_and_does_nothing_else(llm: LLM) -> None:
    with pytest.raises(UsageError, match="decoder"):
        llm.embed("x")


def test_chat_can_be_streamed(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    whole = llm.chat(conversation, IGNORE_EOS).outputs[0].text
    handle = llm.chat_async(conversation, IGNORE_EOS, streaming=True)
    assert "".join(output.outputs[0].text_diff for output in handle) == whole


def test_a_process_ends_though_nobody_shut_the_llm_down(tiny_llama_engine: Path) -> None:
    code = (
        "import sys; from trtllm import LLM, SamplingParams; llm = LLM(sys.argv[1], threads=1);"
        "llm.generate_async([1], SamplingParams(max_tokens=90, ignore_eos=True)); print('done')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tiny_llama_engine)], capture_output=True, text=True, timeout=60, cwd="/"
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "done"), ran.stderr
