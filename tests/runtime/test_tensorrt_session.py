"""TensorRT engines with a gathered cache, on a GPU and a library that are not there: see fake_cuda, fake_tensorrt."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm import BuildConfig, compile
from trtllm.compiler.engine import Engine
from trtllm.errors import TargetError, UsageError
from trtllm.runtime.session import open_session

CAPACITY, SIZE, BLOCKS = 96, 8, 40
PROMPT = np.random.default_rng(1).integers(0, 250, 37)
TOLERANCE = np.finfo(np.float32).eps * 8 * 15
"""Products of other row counts sum in another order: eps * sqrt(64) for 7 products of 2 layers and the head."""


@pytest.fixture
def open_one(gathered_engines: dict[bool, Engine], fake_gpu: Any) -> Callable[..., "Stepper"]:
    return lambda gathers_all=False, **options: Stepper(open_session(gathered_engines[gathers_all], **options))


@pytest.fixture
def reference(padded_engines: dict[bool, Engine]) -> Callable[..., np.ndarray]:
    """Logits of all tokens of a text, computed in one piece without a cache of blocks."""
    session = open_session(padded_engines[True])

    def logits(tokens: np.ndarray) -> np.ndarray:
        count = len(tokens)
        starts, table = np.array([0, count]), np.zeros((1, 1), np.int32)
        return session.step(tokens, np.arange(count), starts, np.zeros(1, np.int64), np.arange(count), [table]).copy()

    return logits


class Stepper:
    """Runs rows of slots, whose blocks are scattered over the pool."""

    def __init__(self, session: Any, seed: int = 3) -> None:
        self.session = session
        self.columns = CAPACITY // SIZE
        order = np.random.default_rng(seed).permutation(session.info.cache.num_blocks).astype(np.int32)
        self.tables = order[: len(order) // self.columns * self.columns].reshape(-1, self.columns)

    def step(
        self, *rows: tuple[int, np.ndarray, int], wanted: list[int] | None = None, copies: Any = (), whole: Any = None
    ) -> np.ndarray:
        """(slot, new tokens, past tokens) side by side; the last logits of each unless others are wanted."""
        ends = np.cumsum([len(tokens) for _, tokens, _ in rows], dtype=np.int64)
        table = self.tables[[slot for slot, _, _ in rows]] if rows else np.zeros((0, self.columns), np.int32)
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
            *([] if whole is None else [np.array(whole, np.uint8)]),
        )

    def copies(self, source: int, destination: int, tokens: int) -> list[tuple[int, int, int, int]]:
        """The blocks of the first tokens of a slot to those of another."""
        return [
            (0, int(self.tables[source, i]), int(self.tables[destination, i]), min(SIZE, tokens - i * SIZE))
            for i in range(-(-tokens // SIZE))
        ]


def close(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.abs(left - right).max() <= TOLERANCE * np.abs(right).max())


def test_a_prompt_in_chunks_and_its_continuation_have_the_logits_of_the_text(
    open_one: Callable[..., Stepper], reference: Callable[..., np.ndarray]
) -> None:
    """37 tokens go through profiles of 16, 16 and 16, of which the last holds 5."""
    one, expected = open_one(), reference(np.concatenate([PROMPT, PROMPT[:20]]))
    assert close(one.step((1, PROMPT, 0)), expected[36:37])
    for index in range(20):
        assert close(one.step((1, PROMPT[index : index + 1], 37 + index)), expected[37 + index : 38 + index])


@pytest.mark.parametrize("count", range(1, 7))
def test_rows_of_all_kinds_share_a_step(
    open_one: Callable[..., Stepper], reference: Callable[..., np.ndarray], count: int
) -> None:
    """Single tokens beyond the largest batch of 4 run in a second one, which is padded."""
    one, past, lengths = open_one(), [9, 20, 0, 7, 5, 23][:count], [1, 1, 1, 5, 1, 1][:count]
    one.columns = 3
    one.tables = one.tables.reshape(-1, 3)
    texts = [np.random.default_rng(10 + slot).integers(0, 250, 24) for slot in range(count)]
    for slot in range(count):
        if past[slot]:
            one.step((slot, texts[slot][: past[slot]], 0))
    logits = one.step(
        *((slot, texts[slot][past[slot] : past[slot] + lengths[slot]], past[slot]) for slot in range(count))
    )
    for slot in range(count):
        assert close(logits[slot], reference(texts[slot][: past[slot] + lengths[slot]])[-1])


def test_the_smallest_shape_that_holds_a_step_runs_it(open_one: Callable[..., Stepper]) -> None:
    programs = open_one().session._programs
    shape = lambda program: (program.extents.rows, program.extents.tokens, program.extents.columns)  # noqa: E731
    assert shape(programs.for_rows(1, 4)) == (1, 1, 4)
    assert shape(programs.for_rows(3, 4)) == (4, 1, 4)
    assert shape(programs.for_rows(2, 5)) == (2, 1, 12)
    assert shape(programs.for_chunk(2, 12)) == (1, 4, 12)
    assert shape(programs.for_chunk(5, 0)) == (1, 16, 12)
    assert shape(programs.for_chunk(500, 3)) == (1, 16, 12)


def test_only_the_logits_that_are_asked_for_cross_the_bus(open_one: Callable[..., Stepper], fake_gpu: Any) -> None:
    one = open_one()
    before = fake_gpu.counts["copied_to_host"]
    assert one.step((0, PROMPT, 0), wanted=[]).shape == (0, 300)
    assert fake_gpu.counts["copied_to_host"] == before
    one.step((0, PROMPT[:1], 37), (1, PROMPT[:1], 0), wanted=[1])
    assert fake_gpu.counts["copied_to_host"] == before + 300 * 4


def test_rows_stay_on_the_gpu_and_their_best_come(open_one: Callable[..., Stepper], fake_gpu: Any) -> None:
    """Rows of three runs: two prompts and a batch of single tokens; the prompts' rows are kept from the later runs."""
    one = open_one()
    count = one.session.info.num_candidates
    assert count == 16
    for slot in (0, 1):
        one.step((slot, PROMPT[: 5 + slot], 0))
    rows = ((2, PROMPT[:9], 0), (0, PROMPT[:1], 5))
    expected = one.step(*rows).copy()
    before = fake_gpu.counts["copied_to_host"]
    logits = one.step(*rows, whole=[0, 0])
    assert fake_gpu.counts["copied_to_host"] - before < 2 * 1024
    values, tokens, sums = one.session.candidates()
    order = np.argsort(-expected, 1, kind="stable")[:, :count]
    assert np.array_equal(tokens, order)
    assert np.array_equal(values, np.take_along_axis(expected, order, 1))
    assert np.allclose(sums, np.log(np.exp(expected.astype(np.float64)).sum(1)), rtol=1e-6)
    for index in range(2):
        one.session.complete(index)
        assert np.array_equal(logits[index], expected[index])
    assert np.array_equal(one.step(*rows, whole=[1, 0])[0], expected[0])
    assert np.array_equal(one.session.candidates()[1][1], order[1])
    one.session.complete(1)
    assert np.array_equal(one.step(*rows, whole=[]), expected)


def test_candidates_of_one_batch_are_those_of_its_rows(open_one: Callable[..., Stepper]) -> None:
    one = open_one()
    rows = [(slot, PROMPT[slot : slot + 1], 0) for slot in range(3)]
    expected = one.step(*rows).copy()
    one.step(*rows, whole=[0, 0, 0])
    _, tokens, _ = one.session.candidates()
    assert np.array_equal(tokens[:, 0], expected.argmax(1))
    one.step(*rows, wanted=[0, 2], whole=[0, 0])
    assert np.array_equal(one.session.candidates()[1][:, 0], expected[[0, 2]].argmax(1))


def test_logits_inside_a_row_come_where_the_plan_makes_them(
    open_one: Callable[..., Stepper], reference: Callable[..., np.ndarray]
) -> None:
    wanted = [0, 3, 4, 15, 16, 36]
    assert close(open_one(gathers_all=True).step((0, PROMPT, 0), wanted=wanted), reference(PROMPT)[wanted])
    with pytest.raises(UsageError, match="last token only"):
        open_one().step((0, PROMPT, 0), wanted=wanted)


def test_a_sequence_sees_nothing_of_who_had_its_blocks_before(
    open_one: Callable[..., Stepper], fake_gpu: Any, reference: Callable[..., np.ndarray]
) -> None:
    """Another one's values may be no numbers, and zero times those is no number."""
    one = open_one()
    one.step((0, np.arange(90) % 250, 0))
    pool = one.session._pool
    for name, address in pool.addresses.items():
        heads, size = 2, 16
        memory = fake_gpu.bytes_at(address, BLOCKS * heads * SIZE * size * 4).view(np.float32)
        memory[:] = np.nan
        assert name.startswith("past_")
    expected = reference(PROMPT[:20])
    assert close(one.step((0, PROMPT[:5], 0)), expected[4:5])
    assert close(one.step((0, PROMPT[5:19], 5)), expected[18:19])
    assert close(one.step((0, PROMPT[19:20], 19)), expected[19:20])
    for address in pool.addresses.values():
        block = fake_gpu.bytes_at(address + int(one.tables[0, 2]) * 2 * SIZE * 16 * 4, 2 * SIZE * 16 * 4)
        kept = block.view(np.float32).reshape(2, SIZE, 16)
        assert np.isfinite(kept).all() and kept[:, :4].all() and not kept[:, 4:].any()


def test_graphs_are_launched_from_the_second_run_on(open_one: Callable[..., Stepper], fake_gpu: Any) -> None:
    one = open_one()
    for index in range(5):
        one.step((0, PROMPT[index : index + 1], index))
    assert (fake_gpu.counts["enqueue"], fake_gpu.counts["graph"]) == (2, 4)  # the second is the capture itself
    assert one.session.notes == []


def test_a_library_that_refuses_graphs_runs_without_them(
    open_one: Callable[..., Stepper], fake_gpu: Any, reference: Callable[..., np.ndarray]
) -> None:
    fake_gpu.refuses_capture = True
    one, expected = open_one(), reference(PROMPT)
    one.step((0, PROMPT[:1], 0))
    one.step((0, PROMPT[1:2], 1))
    with pytest.warns(RuntimeWarning, match="no CUDA graph of 1 x 1 tokens over 4 blocks: .*capturing"):
        one.step((0, PROMPT[2:3], 2))
    assert close(one.step((0, PROMPT[3:4], 3)), expected[3:4])
    assert fake_gpu.counts["graph"] == 0
    assert len(one.session.notes) == 1


def test_warming_up_makes_every_graph_and_touches_no_block(
    open_one: Callable[..., Stepper], fake_gpu: Any, reference: Callable[..., np.ndarray]
) -> None:
    one = open_one()
    one.step((0, PROMPT[:30], 0))
    one.session.warm_up()
    enqueued = fake_gpu.counts["enqueue"]
    expected = reference(PROMPT)
    for index in range(30, 37):
        assert close(one.step((0, PROMPT[index : index + 1], index)), expected[index : index + 1])
    assert fake_gpu.counts["enqueue"] == enqueued


def test_a_step_that_fills_the_pinned_memory_waits_for_the_gpu(
    open_one: Callable[..., Stepper], monkeypatch: pytest.MonkeyPatch, reference: Callable[..., np.ndarray]
) -> None:
    monkeypatch.setattr("trtllm.runtime.sessions.tensorrt_session._ARENA_BYTES", 1)
    assert close(open_one().step((0, PROMPT, 0)), reference(PROMPT)[-1:])


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
    one = open_one(num_host_blocks=CAPACITY // SIZE)
    host = one.session.info.cache.num_blocks
    one.step((1, PROMPT, 0))
    expected = one.step((1, PROMPT[:1], len(PROMPT))).copy()
    away = [(group, source, host + i, count) for i, (group, source, _, count) in enumerate(one.copies(1, 1, 37))]
    one.step((1, PROMPT[::-1].copy(), 0), copies=away)
    back = [(group, there, source, count) for group, source, there, count in away]
    assert np.array_equal(one.step((1, PROMPT[:1], len(PROMPT)), copies=back), expected)


def test_copies_are_done_in_their_order(open_one: Callable[..., Stepper]) -> None:
    """A block moves on to two others before the next one takes its place."""
    one = open_one()
    for slot in range(2):
        one.step((slot, PROMPT[slot * SIZE : (slot + 1) * SIZE], 0))
    expected = [one.step((slot, PROMPT[:1], SIZE)).copy() for slot in range(2)]
    blocks = one.tables[:, 0].tolist()
    spare = one.tables[2, 1:3].tolist()
    chain = [(blocks[0], spare[0]), (spare[0], spare[1]), (blocks[1], blocks[0]), (spare[1], blocks[1])]
    one.step(copies=[(0, source, destination, SIZE) for source, destination in chain])
    for slot in range(2):
        assert np.array_equal(one.step((slot, PROMPT[:1], SIZE)), expected[1 - slot])


def test_other_weights_take_over_between_two_steps(
    open_one: Callable[..., Stepper], fake_tensorrt: Any, tmp_path: Path, tiny_llama_directory: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama_directory)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    model.save_pretrained(tmp_path / "other")
    config = BuildConfig(max_batch_size=6, max_seq_len=CAPACITY, optimization_level=1)
    other = compile(tmp_path / "other", output_dir=tmp_path / "linear", config=config)
    shapes = [fake_tensorrt.Shape(rows, 1, 12) for rows in (1, 4)] + [fake_tensorrt.Shape(1, 16, 12)]
    engine = fake_tensorrt.write_engine(tmp_path / "plan", other, shapes, num_blocks=BLOCKS + 1, tokens_per_block=SIZE)
    one, fresh = open_one(), Stepper(open_session(engine))
    before = one.step((0, PROMPT, 0)).copy()
    take = one.session.loaded(engine)
    assert np.array_equal(one.step((0, PROMPT, 0)), before)
    take()
    gc.collect()
    assert np.array_equal(one.step((0, PROMPT, 0)), fresh.step((0, PROMPT, 0)))
    assert not np.allclose(one.step((0, PROMPT, 0)), before)


def test_steps_that_do_not_fit_are_refused_and_change_nothing(open_one: Callable[..., Stepper]) -> None:
    one = open_one()
    one.step((0, PROMPT, 0))
    expected = one.step((0, PROMPT[:1], 37)).copy()
    with pytest.raises(UsageError, match="does not fit"):
        one.step((0, PROMPT, CAPACITY - 5))
    with pytest.raises(UsageError, match="exceeds"):
        one.step(*((0, PROMPT[:1], 0) for _ in range(7)))
    with pytest.raises(UsageError, match="outside the vocabulary"):
        one.step((0, np.array([300]), 3))
    one.tables = np.concatenate([one.tables, np.full((1, 12), BLOCKS, np.int32)])
    with pytest.raises(UsageError, match="fit the cache"):
        one.step((len(one.tables) - 1, PROMPT, 0))
    with pytest.raises(UsageError, match="leaves the pool"):
        one.step(copies=[(0, 0, BLOCKS, 1)])
    assert np.array_equal(one.step((0, PROMPT[:1], 37)), expected)


@pytest.mark.parametrize("options", [{"tokens_per_block": 16}, {"num_blocks": BLOCKS + 1}, {"num_blocks": 0}])
def test_a_gathered_cache_is_what_it_was_built_as(open_one: Callable[..., Stepper], options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"built for {BLOCKS} of {SIZE}"):
        open_one(**options)


def test_a_smaller_pool_is_fine(open_one: Callable[..., Stepper], reference: Callable[..., np.ndarray]) -> None:
    one = open_one(num_blocks=13, num_host_blocks=2)
    assert close(one.step((0, PROMPT, 0)), reference(PROMPT)[-1:])
    one.step(copies=[(0, int(one.tables[0, 4]), 14, 5)])
    one.step((0, PROMPT[::-1].copy(), 0))
    one.step((0, PROMPT[:32], 0))
    one.step(copies=[(0, 14, int(one.tables[0, 4]), 5)])
    assert close(one.step((0, PROMPT[:1], 37)), reference(np.append(PROMPT, PROMPT[0]))[-1:])


def test_a_plan_without_a_profile_for_long_sequences_is_refused(
    padded_engines: dict[bool, Engine], fake_tensorrt: Any, fake_gpu: Any, tmp_path: Path
) -> None:
    shapes = [fake_tensorrt.Shape(1, 1, 12), fake_tensorrt.Shape(1, 16, 4)]
    engine = fake_tensorrt.write_engine(tmp_path / "plan", padded_engines[False], shapes, tokens_per_block=SIZE)
    with pytest.raises(TargetError, match="no profile for prompts of sequences of 96 tokens"):
        open_session(engine)
