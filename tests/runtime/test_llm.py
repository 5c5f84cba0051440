"""Generation on a tiny engine: equal to transformers, alone and in a batch; limits and misuse are answered clearly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm import LLM, SamplingParams
from trtllm.errors import BadInputError, UsageError

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


def test_a_model_that_was_never_built_is_no_engine(tiny_llama_directory: Path) -> None:
    with pytest.raises(BadInputError, match=r"manifest\.json"):
        LLM(tiny_llama_directory)
