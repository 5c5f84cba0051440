"""Perplexity of an engine against transformers on the same tokens, and the sums behind it."""

import numpy as np
import pytest

from trtllm.compiler.engine import open_engine
from trtllm.errors import UsageError
from trtllm.runtime.perplexity import Score, log_softmax, perplexities, perplexity

TOKENS = np.random.default_rng(4).integers(0, 256, 150)


def test_it_is_that_of_transformers(tiny_llama_directory, tiny_llama_engine) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama_directory)
    losses = []
    for start in range(0, len(TOKENS), 64):
        window = torch.from_numpy(TOKENS[None, start : start + 64])
        with torch.no_grad():
            logits = model(window).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none").numpy())
    found = perplexity(open_engine(tiny_llama_engine), TOKENS, 64)
    assert found.tokens == sum(map(len, losses)) == 147
    # float32 logits of two layers agree to 1e-4 of their size (the parity tests' bound); a loss is two of them
    assert found.negative_log_likelihood == pytest.approx(np.concatenate(losses).mean(), rel=2e-4)
    assert found.perplexity == pytest.approx(np.exp(found.negative_log_likelihood))
    assert found.divergence is None and found.agreement is None


def test_an_engine_agrees_with_itself(tiny_llama_engine) -> None:
    engine = open_engine(tiny_llama_engine)
    found = perplexity(engine, TOKENS, 96, reference=engine)
    assert found.divergence == 0 and found.agreement == 1


def test_engines_side_by_side_score_as_alone(tiny_llama_engine) -> None:
    engine = open_engine(tiny_llama_engine)
    assert (
        perplexities([engine, engine], TOKENS, 96, reference=engine)
        == [perplexity(engine, TOKENS, 96, reference=engine)] * 2
    )


def test_windows_longer_than_a_step_are_scored_as_one() -> None:
    random = np.random.default_rng(1)
    logits, targets = random.normal(size=(40, 30)).astype(np.float32), random.integers(0, 30, 40)
    own, expected = log_softmax(logits), log_softmax(logits[::-1])
    whole, pieces = Score(), Score()
    whole.add(logits, targets, expected)
    for start in range(0, 40, 7):
        pieces.add(logits[start : start + 7], targets[start : start + 7], expected[start : start + 7])
    one, other = whole.result(), pieces.result()
    assert one.negative_log_likelihood == pytest.approx(other.negative_log_likelihood, rel=1e-12)
    assert one.divergence == pytest.approx(other.divergence, rel=1e-6) and one.agreement == other.agreement
    assert one.divergence == pytest.approx((np.exp(expected) * (expected - own)).sum() / 40, rel=1e-5)


@pytest.mark.parametrize(("tokens", "context"), [([5], 64), ([], 64), ([1, 2, 3], 1), ([1, 2], 97)])
def test_what_cannot_be_scored_is_refused(tiny_llama_engine, tokens, context) -> None:
    with pytest.raises(UsageError):
        perplexity(open_engine(tiny_llama_engine), tokens, context)
