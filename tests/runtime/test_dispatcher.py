"""Responses reach those who wait, in threads and event loops; nobody waits for ever, whatever fails."""

import asyncio
import gc
import importlib.util
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trtllm.errors import TrtllmError, UsageError
from trtllm.runtime.dispatcher import Dispatcher, RequestHandle
from trtllm.runtime.sampling import SamplingParams
from trtllm.runtime.sequences import GeneratedRequest

PATIENCE = 10.0
"""Seconds that a test waits before it says that something hangs."""


def _load_fake() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_executor", Path(__file__).with_name("fake_executor.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_executor"] = module
    spec.loader.exec_module(module)
    return module


FAKE = _load_fake()


@pytest.fixture
def executor() -> Any:
    return FAKE.FakeExecutor()


@pytest.fixture
def dispatcher(executor: Any) -> Iterator[Dispatcher]:
    made = Dispatcher(executor)
    yield made
    made.shutdown(finish=False)


def submit(dispatcher: Dispatcher, *, streaming: bool = False, **params: Any) -> RequestHandle:
    chosen = SamplingParams(**params)
    return dispatcher.submit(
        object(), lambda request_id: GeneratedRequest(request_id, None, [1], chosen, None), streaming=streaming
    )


def test_a_thread_that_waits_gets_the_finished_output(executor: Any, dispatcher: Dispatcher) -> None:
    handle = submit(dispatcher, logprobs=0)
    assert not handle.finished
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    executor.say(handle.request_id, [5, 6])
    executor.end(handle.request_id, "length", [7], cumulative_logprob=-2.0)
    output = handle.result(PATIENCE)
    assert output.finished and handle.finished
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([5, 6, 7], "length")
    assert output.outputs[0].cumulative_logprob == -2.0
    assert handle.result(PATIENCE).outputs[0].token_ids == [5, 6, 7]


def test_every_iteration_sees_all_tokens_once(executor: Any, dispatcher: Dispatcher) -> None:
    handle = submit(dispatcher, streaming=True)
    seen: list[list[int]] = [[] for _ in range(3)]

    def follow(tokens: list[int]) -> None:
        for output in handle:
            tokens += output.outputs[0].token_ids_diff

    threads = [threading.Thread(target=follow, args=(tokens,)) for tokens in seen]
    for thread in threads:
        thread.start()
    for token in range(100):
        executor.say(handle.request_id, [token])
    executor.end(handle.request_id)
    for thread in threads:
        thread.join(PATIENCE)
    assert seen == [list(range(100))] * 3
    assert [token for output in handle for token in output.outputs[0].token_ids_diff] == list(range(100))


def test_without_streaming_an_iteration_sees_the_end_only(executor: Any, dispatcher: Dispatcher) -> None:
    handle = submit(dispatcher)
    executor.say(handle.request_id, [1])
    executor.end(handle.request_id, "length", [2])
    assert [output.outputs[0].token_ids for output in handle] == [[1, 2]]


def test_several_event_loops_wait_for_the_same_requests(executor: Any, dispatcher: Dispatcher) -> None:
    handles = [submit(dispatcher, streaming=True) for _ in range(20)]
    results: list[list[list[int]]] = []

    async def follow(handle: RequestHandle) -> list[int]:
        tokens = [token async for output in handle for token in output.outputs[0].token_ids_diff]
        assert (await handle).outputs[0].token_ids == tokens
        return tokens

    async def follow_all() -> None:
        results.append(await asyncio.wait_for(asyncio.gather(*map(follow, handles)), PATIENCE))

    threads = [threading.Thread(target=lambda: asyncio.run(follow_all())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for token in range(10):
        for handle in handles:
            executor.say(handle.request_id, [token])
    for handle in handles:
        executor.end(handle.request_id)
    for thread in threads:
        thread.join(PATIENCE)
    assert results == [[list(range(10))] * 20] * 3


def test_a_coroutine_that_is_cancelled_leaves_the_request_to_others(executor: Any, dispatcher: Dispatcher) -> None:
    handle = submit(dispatcher)

    async def scenario() -> list[int]:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle.aresult(), 0.01)
        executor.end(handle.request_id, "length", [3])
        return (await asyncio.wait_for(handle.aresult(), PATIENCE)).outputs[0].token_ids

    assert asyncio.run(scenario()) == [3]
    assert executor.cancelled == []


def test_an_event_loop_that_closed_does_not_disturb_others(executor: Any, dispatcher: Dispatcher) -> None:
    handle = submit(dispatcher)
    loop = asyncio.new_event_loop()
    task = loop.create_task(handle.aresult())
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    executor.end(handle.request_id, "length", [3])
    assert handle.result(PATIENCE).outputs[0].token_ids == [3]
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_an_aborted_request_ends_as_cancelled(executor: Any, dispatcher: Dispatcher) -> None:
    handle = submit(dispatcher)
    executor.say(handle.request_id, [1])
    handle.abort()
    output = handle.result(PATIENCE)
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([1], "cancelled")
    handle.abort()
    assert executor.cancelled == [handle.request_id]


def test_the_error_of_a_request_raises_in_its_own_waiters(executor: Any, dispatcher: Dispatcher) -> None:
    failing, other = submit(dispatcher), submit(dispatcher)
    executor.say(failing.request_id, error="NaN logits", error_hint="check the weights", is_final=True)
    executor.end(other.request_id, "length", [1])
    for _ in range(2):
        with pytest.raises(TrtllmError, match="NaN logits") as raised:
            failing.result(PATIENCE)
        assert raised.value.hint == "check the weights"
    with pytest.raises(TrtllmError, match="NaN logits"):
        asyncio.run(failing.aresult())
    with pytest.raises(TrtllmError, match="NaN logits"):
        next(iter(failing))
    assert other.result(PATIENCE).outputs[0].token_ids == [1]
    assert dispatcher.num_under_way == 0


def test_an_output_that_cannot_be_made_fails_its_request_alone(executor: Any, dispatcher: Dispatcher) -> None:
    failing, other = submit(dispatcher), submit(dispatcher)
    executor.say(failing.request_id, [1], sequence_index=7)
    executor.end(other.request_id, "length", [1])
    with pytest.raises(TrtllmError, match="could not be made"):
        failing.result(PATIENCE)
    assert executor.cancelled == [failing.request_id]
    assert other.result(PATIENCE).finished


def test_when_the_executor_fails_all_waiters_are_told_and_nothing_more_is_taken(
    executor: Any, dispatcher: Dispatcher
) -> None:
    handles = [submit(dispatcher) for _ in range(3)]
    executor.fail(RuntimeError("lost the device"))
    for handle in handles:
        with pytest.raises(TrtllmError, match="lost the device"):
            handle.result(PATIENCE)
    with pytest.raises(TrtllmError, match="lost the device"):
        submit(dispatcher)


def test_a_shutdown_delivers_what_came_and_tells_the_rest() -> None:
    executor = FAKE.FakeExecutor()
    dispatcher = Dispatcher(executor)
    served, abandoned = submit(dispatcher), submit(dispatcher)
    executor.end(served.request_id, "length", [1])
    dispatcher.shutdown(finish=True)
    assert served.result(0).outputs[0].token_ids == [1]
    with pytest.raises(TrtllmError, match="shut down"):
        abandoned.result(0)
    with pytest.raises(UsageError, match="shut down"):
        submit(dispatcher)
    dispatcher.shutdown(finish=True)


def test_finished_requests_are_forgotten(executor: Any, dispatcher: Dispatcher) -> None:
    for _ in range(100):
        executor.end(submit(dispatcher).request_id)
    handle = submit(dispatcher)
    executor.end(handle.request_id)
    handle.result(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while dispatcher.num_under_way and time.monotonic() < deadline:
        time.sleep(0.001)
    assert dispatcher.num_under_way == 0
    gc.collect()
    alive = sum(isinstance(item, RequestHandle) for item in gc.get_objects())
    assert alive <= 3  # this test's, and what the interpreter still holds of the loop


def test_a_handle_that_lives_on_keeps_no_engine() -> None:
    executor = FAKE.FakeExecutor()
    dispatcher = Dispatcher(executor)
    handle = submit(dispatcher)
    executor.end(handle.request_id)
    handle.result(PATIENCE)
    dispatcher.shutdown(finish=True)
    reference = weakref.ref(executor)
    del executor, dispatcher
    gc.collect()
    assert reference() is None
    handle.abort()
