"""Sampling parameters are checked by name, type and range."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from trtllm.errors import UsageError
from trtllm.runtime.guided_decoding import GuidedDecodingParams
from trtllm.runtime.sampling import LookaheadDecodingConfig, SamplingParams

REFERENCE_DEFAULTS = {
    "max_tokens": 32, "n": 1, "include_stop_str_in_output": False, "apply_batched_logits_processor": False,
    "use_beam_search": False, "return_context_logits": False, "return_generation_logits": False,
    "exclude_input_from_output": True, "return_encoder_output": False, "return_perf_metrics": False,
    "ignore_eos": False, "detokenize": True, "add_special_tokens": True, "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
}  # fmt: skip
REFERENCE_OPTIONAL = (
    "end_id", "pad_id", "bad", "bad_token_ids", "stop", "stop_token_ids", "embedding_bias", "logits_processor",
    "best_of", "top_k", "top_p", "top_p_min", "top_p_reset_ids", "top_p_decay", "seed", "temperature", "min_tokens",
    "beam_search_diversity_rate", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty",
    "early_stopping", "no_repeat_ngram_size", "min_p", "beam_width_array", "logprobs", "prompt_logprobs",
    "additional_model_outputs", "lookahead_config", "guided_decoding", "truncate_prompt_tokens",
    "prompt_ignore_length",
)  # fmt: skip


def test_fields_and_defaults_are_the_reference_ones() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert defaults == REFERENCE_DEFAULTS | dict.fromkeys(REFERENCE_OPTIONAL) | {"logit_bias": None}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_token": 3}, "'max_token' (did you mean 'max_tokens'?)"),
        ({"max_tokens": 0}, "max_tokens is 0, must be at least 1"),
        ({"max_tokens": "3"}, "max_tokens is '3', expected int"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"max_tokens": 2.0}, "max_tokens is 2.0"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -0.1}, "temperature is -0.1, must be at least 0"),
        ({"temperature": "hot"}, "expected float | None"),
        ({"top_p": 1.5}, "top_p is 1.5, must be at least 0 and at most 1"),
        ({"repetition_penalty": 0.0}, "must be above 0"),
        ({"stop": [1]}, "stop is [1]"),
        ({"stop_token_ids": [1, -2]}, "stop_token_ids is -2"),
        ({"stop_token_ids": "ab"}, "stop_token_ids is 'ab'"),
        ({"logit_bias": [(1, 2.0)]}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logits_processor": 3}, "logits_processor is 3"),
        ({"embedding_bias": [[1.0]]}, "embedding_bias"),
        ({"best_of": 2}, "TLLM_ALLOW_N_GREEDY_DECODING"),
        ({"n": 2}, "n 2 with greedy decoding"),
        ({"n": 3, "best_of": 2, "top_k": 5}, "best_of 2 is less than n 3"),
        ({"min_tokens": 40}, "min_tokens 40 exceeds max_tokens 32"),
        ({"guided_decoding": {"regex": "a"}}, "guided_decoding"),
        ({"return_encoder_output": True}, "return_encoder_output"),
        ({"additional_model_outputs": ["hidden"]}, "hidden"),
        ({"beam_width_array": [2]}, "needs use_beam_search"),
    ],
)
def test_what_is_wrong_is_said_by_name(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        SamplingParams(**values)
    assert says in str(raised.value)


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(UsageError, match=r"max_tokens.*stop_token_ids.*top_p"):
        SamplingParams(max_tokens=-1, top_p=2.0, stop_token_ids="x")  # type: ignore[arg-type]


def test_values_of_other_libraries_become_plain_ones() -> None:
    params = SamplingParams(
        max_tokens=np.int64(5), temperature=np.float32(0.5), top_k=np.int32(3), stop_token_ids=np.array([1, 2])
    )
    assert (type(params.max_tokens), type(params.temperature), params.stop_token_ids) == (int, float, [1, 2])
    assert SamplingParams(temperature=1, stop=("a", "b")) == SamplingParams(temperature=1.0, stop=["a", "b"])


def test_several_greedy_sequences_are_allowed_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLLM_ALLOW_N_GREEDY_DECODING", "1")
    assert SamplingParams(n=2).num_sampled == 2
    monkeypatch.setenv("TLLM_ALLOW_N_GREEDY_DECODING", "0")
    with pytest.raises(UsageError):
        SamplingParams(n=2)


def test_parameters_do_not_change_after_they_were_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().max_tokens = 5  # type: ignore[misc]
    assert SamplingParams(lookahead_config=LookaheadDecodingConfig(max_ngram_size=2)).is_greedy
    assert not SamplingParams(use_beam_search=True, best_of=4, n=2).is_greedy
    assert SamplingParams(guided_decoding=GuidedDecodingParams(regex="a+")).guided_decoding is not None


@pytest.mark.parametrize(
    ("values", "greedy"),
    [
        ({}, True), ({"temperature": 0.0, "top_p": 0.9}, True), ({"temperature": 2.0, "top_k": 1}, True),
        ({"top_p": 0.0}, True), ({"temperature": 1.0}, False), ({"top_k": 5}, False), ({"top_p": 0.9}, False),
        ({"top_k": 0}, False),
    ],
)  # fmt: skip
def test_greedy_unless_sampling_is_asked_for(values: dict[str, Any], greedy: bool) -> None:
    assert SamplingParams(**values).is_greedy is greedy
