"""Engines of tiny random models give the logits of transformers: prompt, steps through the cache, ragged batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm.compiler.pipeline import build_engine
from trtllm.config import build_config
from trtllm.runtime.session import open_session

PROMPT, STEPS = 21, 4
"""Tokens: the prompt is longer than every window and than every original rotary length."""
RAGGED = (3, 9, 14)
"""Prompt lengths of the batch; with STEPS more the longest crosses the original rotary length."""


@dataclass(frozen=True, eq=False)
class Built:
    """An engine's session and whether it returns logits of every token."""

    session: Any
    gathers: bool


def tolerance(model: Any, logits: np.ndarray) -> float:
    """The largest difference that float32 rounding explains.

    A layer has some 7 products (q, k, v, scores, values, output and the MLP's as one), the head is one more. A product
    sums about `hidden` terms, each rounded by at most eps relative to the sum's scale; independent errors grow as the
    root of their number: eps * sqrt(hidden) a product, added up over products, relative to the largest logit. Two
    layers of 64 features give 1.4e-5.
    """
    config = model.config
    products = 7 * config.num_hidden_layers + 1
    return float(np.finfo(np.float32).eps * np.sqrt(config.hidden_size) * products * np.abs(logits).max())


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 128, length)


@pytest.fixture(scope="module")
def expected(variant: Any, model: Any, transformers_logits: Callable[..., np.ndarray]) -> dict[int, np.ndarray]:
    """transformers' logits by prompt length: of the prompt, then of STEPS single tokens."""
    lengths = (*RAGGED, PROMPT)
    return {length: transformers_logits(variant, model, tokens(length + STEPS, length), length) for length in lengths}


@pytest.fixture(scope="module")
def expected_by_token(variant: Any, model: Any, transformers_logits: Callable[..., np.ndarray]) -> np.ndarray:
    """transformers' logits of a row of which every token was a step."""
    return transformers_logits(variant, model, tokens(PROMPT, 1), 1)


@pytest.fixture(scope="module", params=[True, False], ids=["all-logits", "last-logits"])
def gathers(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["O0", "O1", "O2"])
def built(request: pytest.FixtureRequest, model: Any, gathers: bool, tmp_path_factory: pytest.TempPathFactory) -> Built:
    options = {
        "optimization_level": request.param,
        "gather_context_logits": gathers,
        "max_batch_size": len(RAGGED),
        "max_seq_len": 32,
    }
    folder: Path = tmp_path_factory.mktemp("engine") / "engine"
    return Built(open_session(build_engine(model, folder, build_config(options)), threads=1), gathers)


def prefill(built: Built, slot: int, row: np.ndarray) -> np.ndarray:
    return built.session.step(slot, row[None], np.zeros(1, np.int64))[0].copy()


def test_a_prompt_in_one_step_gives_the_logits_of_transformers(
    built: Built, model: Any, expected: dict[int, np.ndarray]
) -> None:
    wanted = expected[PROMPT][:PROMPT]
    got = prefill(built, 0, tokens(PROMPT + STEPS, PROMPT)[:PROMPT])
    assert got.shape[0] == (PROMPT if built.gathers else 1)
    assert np.abs(got - wanted[-got.shape[0] :]).max() <= tolerance(model, wanted)


def test_a_prompt_and_single_tokens_through_the_cache_give_the_logits_of_transformers(
    built: Built, model: Any, expected: dict[int, np.ndarray]
) -> None:
    row = tokens(PROMPT + STEPS, PROMPT)
    prefill(built, 1, row[:PROMPT])
    for position in range(PROMPT, PROMPT + STEPS):
        got = built.session.step(1, row[None, position : position + 1], np.array([position]))[0, 0]
        assert np.abs(got - expected[PROMPT][position]).max() <= tolerance(model, expected[PROMPT]), position


def test_a_prompt_token_by_token_gives_the_logits_of_transformers(
    built: Built, model: Any, expected_by_token: np.ndarray
) -> None:
    row, wanted = tokens(PROMPT, 1), expected_by_token
    got = [built.session.step(2, row[None, i : i + 1], np.array([i]))[0, 0].copy() for i in range(PROMPT)]
    assert np.abs(np.stack(got) - wanted).max() <= tolerance(model, wanted)


def test_a_ragged_batch_decodes_each_row_as_if_it_were_alone(
    built: Built, model: Any, expected: dict[int, np.ndarray]
) -> None:
    rows = [tokens(length + STEPS, length) for length in RAGGED]
    for slot, (row, length) in enumerate(zip(rows, RAGGED, strict=True)):
        prefill(built, slot, row[:length])
    for step in range(STEPS):
        past = np.array(RAGGED) + step
        column = np.array([[row[position]] for row, position in zip(rows, past, strict=True)])
        got = built.session.step(0, column, past)
        for slot, length in enumerate(RAGGED):
            difference = np.abs(got[slot, 0] - expected[length][length + step]).max()
            assert difference <= tolerance(model, expected[length]), (length, step)
