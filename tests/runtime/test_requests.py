"""What a user asks for reaches the executor as it was meant, or is refused by name."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from trtllm.errors import UsageError
from trtllm.runtime.guided_decoding import GuidedDecodingParams
from trtllm.runtime.llm_config import KvCacheRetentionConfig, NGramDecodingConfig, TokenRangeRetentionConfig
from trtllm.runtime.requests import EngineLimits, RequestMaker, RequestOptions
from trtllm.runtime.sampling import LookaheadDecodingConfig, SamplingParams
from trtllm.runtime.tokenizer import Tokenizer

LIMITS = EngineLimits(vocab_size=300, max_input_len=20, max_seq_len=24, max_batch_size=8, end_ids=(257,))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_directory(folder)


def make(tokenizer: Tokenizer | None, prompt: Any = "abc", **params: Any) -> Any:
    return RequestMaker(SimpleNamespace, LIMITS, tokenizer, max_beam_width=4).make(
        prompt, SamplingParams(**params), RequestOptions()
    )


def with_options(prompt: Any = (1,), **options: Any) -> Any:
    return RequestMaker(SimpleNamespace, LIMITS, None).make(prompt, SamplingParams(), RequestOptions(**options)).native


def test_prompts_come_as_text_ids_or_dicts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc")
    forms = ["abc", ids, tuple(ids), np.array(ids), {"prompt": "abc"}, {"prompt_token_ids": ids}]
    made = [make(tokenizer, form) for form in forms]
    assert [request.native.input_token_ids for request in made] == [ids] * len(forms)
    assert all(type(token) is int for request in made for token in request.native.input_token_ids)
    assert [request.prompt for request in made] == ["abc", None, None, None, "abc", None]
    assert make(tokenizer, "abcdef", truncate_prompt_tokens=2).native.input_token_ids == tokenizer.encode("ef")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1] * 21, "21 tokens, the engine takes 20"),
        ([300], "token id 300"),
        ([-1], "token id -1"),
        ([1.5], "pass a string"),
        (["a"], "pass a string"),
        (b"abc", "pass a string"),
        (5, "pass a string"),
        (None, "pass a string"),
        ("\ud800", "surrogate"),
        ({"text": "x"}, "neither 'prompt' nor 'prompt_token_ids'"),
        ({"prompt": "x", "image": 1}, "'image'"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(tokenizer: Tokenizer, prompt: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make(tokenizer, prompt)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, {"top_k": 1, "temperature": 1.0, "top_p": 1.0, "beam_width": 1, "num_return_sequences": 1}),
        ({"temperature": 0.0, "top_p": 0.5}, {"top_k": 1, "top_p": 1.0}),
        ({"temperature": 0.7}, {"top_k": 0, "temperature": 0.7, "top_p": 1.0}),
        ({"top_p": 0.9}, {"top_k": 0, "temperature": 1.0, "top_p": 0.9}),
        ({"top_k": 5, "seed": 7, "min_p": 0.1}, {"top_k": 5, "seed": 7, "min_p": 0.1}),
        ({"use_beam_search": True, "best_of": 4, "n": 2}, {"beam_width": 4, "num_return_sequences": 2}),
        ({"best_of": 3, "top_k": 5}, {"beam_width": 1, "num_return_sequences": 3, "num_logprobs": 0}),
        ({"logprobs": 0, "prompt_logprobs": 2}, {"num_logprobs": 0, "num_prompt_logprobs": 2}),
        ({}, {"num_logprobs": -1, "num_prompt_logprobs": -1, "end_ids": [257], "streaming": False}),
        ({"ignore_eos": True, "stop_token_ids": [3]}, {"end_ids": [3]}),
        ({"end_id": 9, "stop_token_ids": [3, 9]}, {"end_ids": [9, 3]}),
        ({"end_id": -1}, {"end_ids": []}),
        ({"stop": "x"}, {"streaming": True}),
        ({"logit_bias": {3: -1.0}}, {"logit_bias": [(3, -1.0)]}),
        ({"top_p_reset_ids": 4, "top_p": 0.5}, {"top_p_reset_id": 4}),
        ({"frequency_penalty": 0.5, "no_repeat_ngram_size": 2}, {"frequency_penalty": 0.5, "no_repeat_ngram_size": 2}),
    ],
)
def test_sampling_is_told_to_the_executor(
    tokenizer: Tokenizer, params: dict[str, Any], expected: dict[str, Any]
) -> None:
    native = make(tokenizer, **params).native
    assert {name: getattr(native, name) for name in expected} == expected


def test_bad_words_are_forbidden_at_the_beginning_and_inside_of_a_text(tokenizer: Tokenizer) -> None:
    native = make(tokenizer, bad=["ab"], bad_token_ids=[5]).native
    assert native.bad_words == [[5], tokenizer.encode("ab"), tokenizer.encode(" ab")]


def test_processors_run_one_after_the_other(tokenizer: Tokenizer) -> None:
    calls: list[str] = []
    both = [lambda *_: calls.append("first"), lambda *_: calls.append("second")]
    make(tokenizer, logits_processor=both).native.logits_processor(1, 0, [], np.zeros(3))
    assert calls == ["first", "second"]


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"use_beam_search": True, "best_of": 5}, "beam width 5 exceeds max_beam_width 4"),
        ({"top_k": 3, "n": 9}, "9 sequences of one prompt exceed max_batch_size 8"),
        ({"logit_bias": {300: 1.0}}, "token id 300"),
        ({"embedding_bias": [1.0]}, "embedding_bias has 1 numbers, the vocabulary 300"),
        ({"lookahead_config": LookaheadDecodingConfig()}, "speculative_config=NGramDecodingConfig"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(tokenizer: Tokenizer, params: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make(tokenizer, **params)


@pytest.mark.parametrize("params", [{"stop": "x"}, {"bad": "x"}, {"guided_decoding": GuidedDecodingParams(regex="a")}])
def test_without_a_tokenizer_what_needs_one_is_refused(params: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="skip_tokenizer_init"):
        make(None, [1], **params)
    with pytest.raises(UsageError, match="skip_tokenizer_init"):
        make(None, "text")
    assert make(None, [1]).native.input_token_ids == [1]


def test_the_best_of_many_cannot_stream(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="cannot stream"):
        RequestMaker(SimpleNamespace, LIMITS, tokenizer).make(
            "a", SamplingParams(best_of=2, top_k=3), RequestOptions(), streaming=True
        )


def test_a_salt_is_a_number_that_only_the_same_salt_gives() -> None:
    salts = [with_options(cache_salt=salt).cache_salt for salt in ("a", "b", "a", 1, "1")]
    assert salts[0] == salts[2] and len(set(salts)) == 4 and all(0 < salt < 2**64 for salt in salts)
    assert with_options({"prompt_token_ids": [1], "cache_salt": "a"}).cache_salt == salts[0]
    assert not hasattr(with_options(), "cache_salt")


def test_retention_priority_and_time_reach_the_executor() -> None:
    retention = KvCacheRetentionConfig(
        token_range_retention_configs=[
            TokenRangeRetentionConfig(token_start=0, token_end=4, priority=90, duration_ms=1000),
            TokenRangeRetentionConfig(token_start=4),
        ],
        decode_retention_priority=10,
    )
    native = with_options(kv_cache_retention_config=retention, priority=0.9, allotted_time_ms=50)
    assert native.retention_ranges == [(0, 4, 90, 1000), (4, -1, 35, None)]
    assert (native.decode_priority, native.decode_duration_ms) == (10, None)
    assert (native.priority, native.allotted_time_ms) == (0.9, 50)
    with pytest.raises(UsageError, match="priority is 2"):
        with_options(priority=2)


def test_a_lookahead_is_taken_where_the_llm_drafts(tokenizer: Tokenizer) -> None:
    maker = RequestMaker(SimpleNamespace, LIMITS, tokenizer, speculation=NGramDecodingConfig())
    params = SamplingParams(lookahead_config=LookaheadDecodingConfig())
    assert maker.make("a", params, RequestOptions()).native.max_tokens == 32
