"""Sessions over packed tokens: the two forms of the cache, blocks copied, moved and left alone, and steps refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm import BuildConfig, compile
from trtllm.compiler.engine import open_engine
from trtllm.errors import UsageError
from trtllm.runtime.session import open_session, session_info

SLOTS, CAPACITY = 3, 96
PROMPT = np.random.default_rng(1).integers(0, 250, 37)


@pytest.fixture(scope="module")
def engines(tiny_llama_directory: Path, tiny_llama_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same model in both forms."""
    folder = tmp_path_factory.mktemp("engines") / "linear"
    config = BuildConfig(max_batch_size=SLOTS, max_seq_len=CAPACITY, optimization_level=1)
    compile(tiny_llama_directory, output_dir=folder, config=config)
    return {"paged": open_engine(tiny_llama_engine), "linear": open_engine(folder)}


@pytest.fixture(params=["paged", "linear"])
def open_one(request: pytest.FixtureRequest, engines: Any) -> Callable[..., "Stepper"]:
    return lambda **options: Stepper(open_session(engines[request.param], threads=2, **options))


class Stepper:
    """Runs rows of slots, whose blocks follow each other."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.columns = -(-CAPACITY // session.info.cache.tokens_per_block)

    def step(self, *rows: tuple[int, np.ndarray, int], wanted: list[int] | None = None, copies: Any = ()) -> np.ndarray:
        """(slot, new tokens, past tokens) side by side; the last logits of each unless others are wanted."""
        ends = np.cumsum([len(tokens) for _, tokens, _ in rows], dtype=np.int64)
        slots = np.array([slot for slot, _, _ in rows], np.int64)
        table = (slots[:, None] * self.columns + np.arange(self.columns)).astype(np.int32)
        parts = [tokens for _, tokens, _ in rows]
        positions = [np.arange(past, past + len(tokens)) for _, tokens, past in rows]
        return self.session.step(
            np.concatenate([np.zeros(0, np.int64), *parts]),
            np.concatenate([np.zeros(0, np.int64), *positions]),
            np.concatenate([[0], ends]),
            np.array([past for _, _, past in rows], np.int64),
            ends - 1 if wanted is None else np.array(wanted, np.int64),
            [table],
            copies,
        )

    def copies(self, source: int, destination: int, tokens: int) -> list[tuple[int, int, int, int]]:
        """The blocks of the first tokens of a slot to those of another."""
        size = self.session.info.cache.tokens_per_block
        return [
            (0, source * self.columns + i, destination * self.columns + i, min(size, tokens - i * size))
            for i in range(-(-tokens // size))
        ]


def test_a_prompt_continues_from_blocks_that_were_copied(open_one: Callable[..., Stepper]) -> None:
    one = open_one()
    one.step((0, PROMPT, 0))
    expected = one.step((0, PROMPT[:5], len(PROMPT))).copy()
    one.step(copies=one.copies(0, 2, len(PROMPT)))
    assert np.array_equal(one.step((2, PROMPT[:5], len(PROMPT))), expected)


def test_only_the_tokens_asked_for_are_copied(open_one: Callable[..., Stepper]) -> None:
    """Prompts that share ten tokens: copying those changes nothing, one more would."""
    one = open_one()
    other = np.concatenate([PROMPT[:10], PROMPT[:9:-1]])
    for slot, prompt in ((0, PROMPT), (1, other)):
        one.step((slot, prompt, 0))
    first, second = (one.step((slot, PROMPT[:1], len(PROMPT))).copy() for slot in (0, 1))
    assert not np.allclose(first, second)
    one.step(copies=one.copies(0, 1, 10))
    assert np.array_equal(one.step((1, PROMPT[:1], len(PROMPT))), second)
    one.step(copies=one.copies(0, 1, len(PROMPT)))
    assert np.array_equal(one.step((1, PROMPT[:1], len(PROMPT))), first)


def test_a_sequence_returns_from_the_host_as_it_left(open_one: Callable[..., Stepper]) -> None:
    one = open_one()
    host = one.session.info.cache.num_blocks
    one = open_one(num_host_blocks=one.columns)
    one.step((1, PROMPT, 0))
    expected = one.step((1, PROMPT[:1], len(PROMPT))).copy()
    away = [(group, source, host + i, count) for i, (group, source, _, count) in enumerate(one.copies(1, 1, 37))]
    one.step((1, PROMPT[::-1].copy(), 0), copies=away)
    back = [(group, there, source, count) for group, source, there, count in away]
    assert np.array_equal(one.step((1, PROMPT[:1], len(PROMPT)), copies=back), expected)


def test_slots_that_are_no_part_of_a_step_are_not_written(open_one: Callable[..., Stepper]) -> None:
    one = open_one()
    for slot in range(SLOTS):
        one.step((slot, PROMPT, 0))
    before = one.step((1, PROMPT[:1], len(PROMPT))).copy()
    for position in range(len(PROMPT), len(PROMPT) + 3):
        one.step((2, PROMPT[:1], position), (0, PROMPT[1:2], position))
    assert np.array_equal(one.step((1, PROMPT[:1], len(PROMPT))), before)


def test_rows_may_come_in_any_order_and_length(open_one: Callable[..., Stepper]) -> None:
    one = open_one()
    one.step((0, PROMPT[:7], 0))
    one.step((2, PROMPT[:9], 0))
    alone = [one.step(row).copy()[0] for row in ((2, PROMPT[9:10], 9), (1, PROMPT[:20], 0), (0, PROMPT[7:8], 7))]
    together = one.step((2, PROMPT[9:10], 9), (1, PROMPT[:20], 0), (0, PROMPT[7:8], 7))
    # Products of other row counts sum in another order: eps * sqrt(64) for 7 products of 2 layers and the head.
    tolerance = np.finfo(np.float32).eps * 8 * 15 * np.abs(together).max()
    assert np.abs(together - np.stack(alone)).max() <= tolerance


def test_a_step_may_want_no_logits_and_hold_no_tokens(open_one: Callable[..., Stepper]) -> None:
    one = open_one()
    assert one.step((0, PROMPT[:20], 0), wanted=[]).shape == (0, 300)
    assert one.step().shape == (0, 300)
    expected = one.step((1, PROMPT, 0)).copy()
    logits = one.step((0, PROMPT[20:], 20))
    assert np.abs(logits - expected).max() <= np.finfo(np.float32).eps * 8 * 15 * np.abs(expected).max()


def test_logits_are_the_callers_until_the_next_step(open_one: Callable[..., Stepper]) -> None:
    logits = open_one().step((0, PROMPT, 0), (1, PROMPT[:1], 0))
    assert logits.flags.c_contiguous and logits.flags.writeable
    assert logits.dtype == np.float32 and logits.shape == (2, 300)


def test_logits_inside_a_row_come_where_the_graph_makes_them(engines: Any) -> None:
    paged = Stepper(open_session(engines["paged"]))
    assert paged.session.info.gathers_all_logits
    inside = paged.step((0, PROMPT, 0), wanted=[3, 36]).copy()
    last = paged.step((1, PROMPT[:4], 0))
    assert np.abs(inside[0] - last[0]).max() <= np.finfo(np.float32).eps * 8 * 15 * np.abs(last).max()
    linear = Stepper(open_session(engines["linear"]))
    assert not linear.session.info.gathers_all_logits
    with pytest.raises(UsageError, match="last token only"):
        linear.step((0, PROMPT, 0), wanted=[3, 36])


def test_the_cache_is_as_large_as_asked_for(engines: Any) -> None:
    info = open_session(engines["paged"]).info
    assert (info.cache.tokens_per_block, info.cache.num_blocks) == (32, SLOTS * 3)
    assert info.cache.groups[0].bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size, float32
    info = open_session(engines["paged"], max_batch_size=40, tokens_per_block=16, num_blocks=7).info
    assert (info.max_batch_size, info.cache.tokens_per_block, info.cache.num_blocks) == (40, 16, 7)
    info = open_session(engines["linear"], num_blocks=2).info
    assert (info.cache.tokens_per_block, info.cache.num_blocks) == (CAPACITY, 2)
    assert info.cache.groups[0].bytes_per_token == 2 * 2 * 2 * 16 * 4


def test_a_batch_larger_than_was_built_runs_on_a_paged_cache(engines: Any) -> None:
    one = Stepper(open_session(engines["paged"], max_batch_size=12))
    for slot in range(12):
        one.step((slot, PROMPT[: slot + 1], 0))
    together = one.step(*((slot, PROMPT[:1], slot + 1) for slot in range(12))).copy()
    assert together.shape == (12, 300)
    alone = one.step((11, PROMPT[:1], 12))
    assert np.abs(together[11] - alone[0]).max() <= np.finfo(np.float32).eps * 8 * 15 * np.abs(alone).max()


@pytest.mark.parametrize("options", [{"tokens_per_block": 24}, {"tokens_per_block": -4}, {"num_blocks": 0}])
def test_a_cache_that_cannot_be_is_refused(engines: Any, options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        open_session(engines["paged"], **options)


@pytest.mark.parametrize("options", [{"tokens_per_block": 32}, {"max_batch_size": 4}])
def test_a_linear_cache_is_what_it_was_built_as(engines: Any, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="3 slots of 96 tokens"):
        open_session(engines["linear"], **options)


def test_steps_that_do_not_fit_are_refused(open_one: Callable[..., Stepper]) -> None:
    one = open_one()
    with pytest.raises(UsageError, match="fit"):
        one.step((0, PROMPT, CAPACITY - 5))
    with pytest.raises(UsageError, match="fit"):
        one.step((SLOTS, PROMPT, 0))
    with pytest.raises(UsageError, match="exceeds" if one.columns > 1 else "slots"):
        one.step(*((slot % SLOTS, PROMPT[:1], 0) for slot in range(SLOTS + 1)))
    with pytest.raises(UsageError, match="leaves the pool"):
        one.step(copies=[(0, 0, one.session.info.cache.num_blocks, 1)])


def test_an_engine_that_says_nothing_of_its_cache_is_linear(engines: Any) -> None:
    config = json.loads(json.dumps(engines["linear"].config))
    recorded = session_info(config)
    del config["cache"]
    assert session_info(config) == recorded
