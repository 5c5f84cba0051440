"""The executor's news become text, log probabilities and reasons to end, whatever pieces they come in."""

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from trtllm.runtime.outputs import Logprob
from trtllm.runtime.sampling import SamplingParams
from trtllm.runtime.sequences import GeneratedRequest
from trtllm.runtime.tokenizer import Tokenizer

_spec = importlib.util.spec_from_file_location("fake_executor", Path(__file__).with_name("fake_executor.py"))
assert _spec is not None and _spec.loader is not None
FAKE = importlib.util.module_from_spec(_spec)
sys.modules["fake_executor"] = FAKE
_spec.loader.exec_module(FAKE)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Token ids are bytes in the alphabet's order."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_directory(folder)


def request(tokenizer: Tokenizer | None, **params: Any) -> GeneratedRequest:
    return GeneratedRequest(1, "hi", [1, 2], SamplingParams(**params), tokenizer)


def final(reason: str = "length", tokens: list[int] | None = None, **fields: Any) -> Any:
    return FAKE.Response(
        1, token_ids=tokens or [], finish_reason=reason, is_sequence_final=True, is_final=True, **fields
    )


@pytest.mark.parametrize(
    ("params", "text", "reason", "stop"),
    [
        ({"stop": "STOP"}, "one é ", "stop", "STOP"),
        ({"stop": ["x", "STOP"], "include_stop_str_in_output": True}, "one é STOP", "stop", "STOP"),
        ({"stop": "STOX"}, "one é STOP two ST", "length", None),
        ({"stop": "one", "min_tokens": 5}, "one é STOP two ST", "length", None),
        ({"stop": "STOP", "detokenize": False}, "", "stop", "STOP"),
        ({}, "one é STOP two ST", "length", None),
    ],
)
@pytest.mark.parametrize("seed", range(8))
def test_stop_strings_cut_the_same_place_whatever_pieces_tokens_come_in(
    tokenizer: Tokenizer, params: dict[str, Any], text: str, reason: str, stop: str | None, seed: int
) -> None:
    tokens = tokenizer.encode("one é STOP two ST")
    generated, chosen = request(tokenizer, **params), random.Random(seed)
    asked = []
    while tokens:
        count = chosen.randint(1, 6)
        piece, tokens = tokens[:count], tokens[count:]
        asked.append(generated.accept(FAKE.Response(1, token_ids=piece)))
    asked.append(generated.accept(final("stopped" if any(asked) else "length", [65])))
    output = generated.snapshot({}).outputs[0]
    kept = tokenizer.encode("one é STOP" if reason == "stop" else "one é STOP two ST")
    assert output.text == (text if reason == "stop" else text + tokenizer.decode([65]) if text else "")
    assert output.token_ids == (kept if reason == "stop" else [*kept, 65])
    assert (output.finish_reason, output.stop_reason) == (reason, stop)
    assert asked.count(True) == (reason == "stop")


def test_a_stop_string_in_the_last_tokens_needs_no_request_to_stop(tokenizer: Tokenizer) -> None:
    generated = request(tokenizer, stop="b")
    assert generated.accept(final("length", tokenizer.encode("abc"))) is False
    output = generated.snapshot({}).outputs[0]
    assert (output.text, output.finish_reason, output.token_ids) == ("a", "stop", tokenizer.encode("ab"))


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("end_id", ("stop", None)), ("length", ("length", None)), ("timed_out", ("timeout", None)),
        ("cancelled", ("cancelled", None)), ("stopped", ("stop", None)), ("stop_words", ("stop", None)),
    ],
)  # fmt: skip
def test_reasons_to_end_have_the_reference_names(reason: str, expected: tuple[str, str | None]) -> None:
    generated = request(None, stop_token_ids=[9])
    generated.accept(final(reason, stop_token=2 if reason == "end_id" else None))
    output = generated.snapshot({}).outputs[0]
    assert (output.finish_reason, output.stop_reason) == expected


def test_a_stop_token_that_was_asked_for_is_the_reason() -> None:
    generated = request(None, stop_token_ids=[9])
    generated.accept(final("end_id", stop_token=9))
    assert generated.snapshot({}).outputs[0].stop_reason == 9


def test_log_probabilities_come_by_token_and_end_with_the_kept_ones(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("abc")
    generated = request(tokenizer, stop="b", logprobs=1)
    chosen = [(ids[0], -1.0, 1), (ids[1], -2.0, 3), (ids[2], -4.0, 1)]
    top = [[(ids[0], -1.0, 1)], [(7, -0.5, 1)], [(ids[2], -4.0, 1)]]
    generated.accept(FAKE.Response(1, token_ids=ids, logprobs=chosen, top_logprobs=top, cumulative_logprob=-7.0))
    generated.accept(final("stopped", cumulative_logprob=-9.0, generation_logits=np.zeros((4, 5), np.float32)))
    output = generated.snapshot({}).outputs[0]
    assert output.logprobs == [{ids[0]: Logprob(-1.0, 1)}, {ids[1]: Logprob(-2.0, 3), 7: Logprob(-0.5, 1)}]
    assert output.cumulative_logprob == -3.0
    assert output.generation_logits is not None and output.generation_logits.shape == (2, 5)


def test_what_belongs_to_the_prompt_and_the_request_arrives() -> None:
    generated = request(None, prompt_logprobs=1, return_perf_metrics=True)
    logits = np.ones((2, 5), np.float32)
    generated.accept(
        FAKE.Response(
            1, prompt_logprobs=[(2, -0.25, 1)], top_prompt_logprobs=[[(2, -0.25, 1), (4, -3.0, 2)]],
            context_logits=logits,
        )
    )  # fmt: skip
    generated.accept(final("length", [3], perf_metrics={"first_iter": 1}))
    result = generated.snapshot({})
    assert result.context_logits is logits
    assert result.outputs[0].prompt_logprobs == [{2: Logprob(-0.25, 1), 4: Logprob(-3.0, 2)}]
    assert result.outputs[0].request_perf_metrics == {"first_iter": 1}
    assert (result.prompt, result.prompt_token_ids) == ("hi", [1, 2])


def test_the_best_of_several_samples_are_returned_best_first() -> None:
    generated = request(None, n=2, best_of=4, temperature=1.0)
    for index, logprob in enumerate([-3.0, -1.0, -4.0, -2.0]):
        generated.accept(
            FAKE.Response(
                1, index, [10 + index], cumulative_logprob=logprob, finish_reason="length",
                is_sequence_final=True, is_final=index == 3,
            )
        )  # fmt: skip
    outputs = generated.snapshot({}).outputs
    assert [(output.index, output.token_ids) for output in outputs] == [(0, [11]), (1, [13])]


def test_the_prompt_is_part_of_the_output_on_request(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("hi ")
    params = SamplingParams(exclude_input_from_output=False, stop="h")
    generated = GeneratedRequest(1, "hi ", prompt, params, tokenizer)
    generated.accept(final("length", tokenizer.encode("you")))
    output = generated.snapshot({}).outputs[0]
    assert (output.text, output.token_ids, output.finish_reason) == ("hi you", tokenizer.encode("hi you"), "length")


def test_differences_begin_where_the_last_output_ended(tokenizer: Tokenizer) -> None:
    generated, seen = request(tokenizer), dict[int, tuple[int, int, int]]()
    generated.accept(FAKE.Response(1, token_ids=tokenizer.encode("ab")))
    first = generated.snapshot(seen).outputs[0]
    generated.accept(final("length", tokenizer.encode("c")))
    second = generated.snapshot(seen).outputs[0]
    assert (first.text_diff, second.text_diff, second.text) == ("ab", "c", "abc")
    assert first.token_ids == tokenizer.encode("ab")
    assert "text='abc'" in repr(second)
