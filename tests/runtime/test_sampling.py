"""The sampler draws from the distribution that the parameters describe."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm.runtime.sampling import Sampler, SamplingParams

LOGITS = np.log(np.array([0.4, 0.05, 0.3, 0.05, 0.2], np.float32))


def frequencies(params: SamplingParams, draws: int = 20_000) -> np.ndarray:
    sampler = Sampler(params)
    return np.bincount([sampler.pick(LOGITS) for _ in range(draws)], minlength=LOGITS.size) / draws


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=1.0), [0.4, 0.05, 0.3, 0.05, 0.2]),
        (SamplingParams(temperature=1.0, top_k=2), [4 / 7, 0, 3 / 7, 0, 0]),
        (SamplingParams(top_p=0.85), [0.4 / 0.9, 0, 0.3 / 0.9, 0, 0.2 / 0.9]),
        (SamplingParams(top_k=3, top_p=0.5), [4 / 7, 0, 3 / 7, 0, 0]),
        (SamplingParams(temperature=0.5), list(np.array([16, 0.25, 9, 0.25, 4]) / 29.5)),
    ],
)
def test_frequencies_follow_the_parameters(params: SamplingParams, expected: list[float]) -> None:
    # four standard deviations of a proportion over 20,000 draws is at most 4 * sqrt(0.25 / 20000) = 0.0142
    assert np.abs(frequencies(params) - expected).max() < 0.0142


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.0, top_p=0.9), SamplingParams(temperature=2.0, top_k=1)]
)
def test_greedy_takes_the_largest_and_of_equals_the_first(params: SamplingParams) -> None:
    assert params.is_greedy
    assert Sampler(params).pick(np.array([1.0, 3.0, 3.0, 2.0], np.float32)) == 1


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.05, 5.0),
)
def test_a_sample_is_always_among_the_tokens_that_top_k_and_top_p_leave(
    seed: int, top_k: int, top_p: float, temperature: float
) -> None:
    logits = np.random.default_rng(seed).normal(size=50).astype(np.float32) * 4
    token = Sampler(SamplingParams(top_k=top_k, top_p=top_p, temperature=temperature, seed=seed)).pick(logits)
    order = np.argsort(-logits, kind="stable")
    rank = int(np.where(order == token)[0][0])
    scaled = np.exp((logits[order] - logits.max()).astype(np.float64) / temperature)
    kept = scaled[: min(top_k, 50)] if top_k else scaled
    before = kept[:rank].sum() / kept.sum()
    assert rank < len(kept)
    assert before <= top_p + 1e-9
