"""Engines of tiny random models give the logits of transformers: prompts whole and in chunks, steps, ragged batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm.compiler.pipeline import build_engine
from trtllm.config import build_config
from trtllm.runtime.session import is_paged, open_session

PROMPT, STEPS = 21, 4
"""Tokens: the prompt is longer than every window and than every original rotary length."""
RAGGED = (3, 9, 14)
"""Prompt lengths of the batch; with STEPS more the longest crosses the original rotary length."""
MIXED = (14, PROMPT, 9)
"""Prompt lengths of rows that start one after another."""
CAPACITY, BLOCK = 32, 4
"""Tokens of a sequence, and of a block where the cache is paged."""


@dataclass(frozen=True, eq=False)
class Built:
    """An engine's session, stepped by rows, and the level it was built at."""

    rows: Any
    level: int


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
def built(
    request: pytest.FixtureRequest,
    model: Any,
    gathers: bool,
    rows_of: Callable[[Any], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Built:
    options = {
        "optimization_level": request.param,
        "gather_context_logits": gathers,
        "max_batch_size": len(RAGGED),
        "max_seq_len": CAPACITY,
    }
    folder: Path = tmp_path_factory.mktemp("engine") / "engine"
    engine = build_engine(model, folder, build_config(options))
    size = {"tokens_per_block": BLOCK} if is_paged(engine.config) else {}
    return Built(rows_of(open_session(engine, threads=1, **size)), request.param)


def test_a_graph_is_packed_at_level_2_unless_its_angles_depend_on_the_length(built: Built, variant: Any) -> None:
    block = built.rows.session.info.cache.tokens_per_block
    if built.level == 2:
        assert (block == BLOCK) is not variant.depends_on_length
    elif variant.config not in ("GPT2Config", "Phi3Config"):  # whose projections are stored in one
        assert block == CAPACITY


def test_a_prompt_in_one_step_gives_the_logits_of_transformers(
    built: Built, model: Any, expected: dict[int, np.ndarray]
) -> None:
    wanted = expected[PROMPT][:PROMPT]
    (got,) = built.rows.step((0, tokens(PROMPT + STEPS, PROMPT)[:PROMPT], 0))
    assert got.shape[0] == (PROMPT if built.rows.session.info.gathers_all_logits else 1)
    assert np.abs(got - wanted[-got.shape[0] :]).max() <= tolerance(model, wanted)


def test_a_prompt_and_single_tokens_through_the_cache_give_the_logits_of_transformers(
    built: Built, model: Any, expected: dict[int, np.ndarray]
) -> None:
    row = tokens(PROMPT + STEPS, PROMPT)
    built.rows.step((1, row[:PROMPT], 0))
    for position in range(PROMPT, PROMPT + STEPS):
        (got,) = built.rows.step((1, row[position : position + 1], position))
        assert np.abs(got[0] - expected[PROMPT][position]).max() <= tolerance(model, expected[PROMPT]), position


def test_a_prompt_token_by_token_gives_the_logits_of_transformers(
    built: Built, model: Any, expected_by_token: np.ndarray
) -> None:
    row, wanted = tokens(PROMPT, 1), expected_by_token
    got = [built.rows.step((2, row[i : i + 1], i))[0][0] for i in range(PROMPT)]
    assert np.abs(np.stack(got) - wanted).max() <= tolerance(model, wanted)


def test_a_ragged_batch_decodes_each_row_as_if_it_were_alone(
    built: Built, model: Any, expected: dict[int, np.ndarray]
) -> None:
    rows = [tokens(length + STEPS, length) for length in RAGGED]
    for slot, (row, length) in enumerate(zip(rows, RAGGED, strict=True)):
        built.rows.step((slot, row[:length], 0))
    for step in range(STEPS):
        past = [length + step for length in RAGGED]
        got = built.rows.step(*((slot, rows[slot][p : p + 1], p) for slot, p in enumerate(past)))
        for logits, length in zip(got, RAGGED, strict=True):
            difference = np.abs(logits[0] - expected[length][length + step]).max()
            assert difference <= tolerance(model, expected[length]), (length, step)


def test_chunks_of_prompts_beside_decoding_rows_give_the_logits_of_transformers(
    built: Built, variant: Any, model: Any, expected: dict[int, np.ndarray]
) -> None:
    """Rows start one step after another, so that every step mixes what the rows are at."""
    chunk = CAPACITY if variant.depends_on_length else 5
    done = dict.fromkeys(MIXED, 0)
    for step in range(CAPACITY):
        batch = []
        for slot, length in list(enumerate(MIXED))[: step + 1]:
            start = done[length]
            stop = min(start + chunk, length) if start < length else min(start + 1, length + STEPS)
            if stop > start:
                batch.append((slot, length, start, stop))
        if not batch:
            break
        got = built.rows.step(*((slot, tokens(n + STEPS, n)[start:stop], start) for slot, n, start, stop in batch))
        for logits, (_, length, _, stop) in zip(got, batch, strict=True):
            wanted = expected[length][stop - len(logits) : stop]
            assert np.abs(logits - wanted).max() <= tolerance(model, expected[length]), (length, stop)
            done[length] = stop
    assert all(done[length] == length + STEPS for length in MIXED)
