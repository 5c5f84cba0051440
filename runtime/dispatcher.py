"""Carries the executor's responses to those who wait for them, in threads and in event loops."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from functools import partial
from typing import Any, Protocol

from trtllm.errors import TrtllmError, UsageError
from trtllm.runtime.outputs import CompletionOutput, RequestOutput
from trtllm.runtime.sequences import GeneratedRequest

_AWAIT_MS = 200


class Executor(Protocol):
    """What is asked of the executor: see `trtllm._native.Executor`."""

    def enqueue(self, request: Any) -> int: ...
    def await_responses(self, timeout_ms: int) -> list[Any]: ...
    def cancel(self, request_id: int) -> None: ...
    def stop_sequence(self, request_id: int, sequence_index: int) -> None: ...
    def shutdown(self, finish: bool) -> None: ...


class RequestHandle:
    """A request under way.

    `await` it or call `result` for the finished RequestOutput; iterate over it, in a loop or with `async for`, for
    outputs as they grow. Every iteration sees all of the text in its `text_diff`s, and one that is slow gets several
    tokens at a time. Any number of threads and event loops may wait. A request that failed raises in each of them.
    """

    def __init__(self, generated: GeneratedRequest, cancel: Callable[[], None], *, streaming: bool) -> None:
        self.request_id = generated.request_id
        self.prompt = generated.prompt
        self.prompt_token_ids = generated.prompt_token_ids
        self._generated = generated
        self._cancel = cancel
        self._streaming = streaming and generated.shows_progress
        self._changed = threading.Condition()
        self._version = 0
        self._error: TrtllmError | None = None
        self._wakers: list[Callable[[], object]] = []

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The outputs as they are now."""
        return self._now().outputs

    @property
    def finished(self) -> bool:
        """Whether it has ended, well or with an error."""
        return self._error is not None or self._generated.finished

    def abort(self) -> None:
        """Ends the request as it stands; its outputs then have the finish reason "cancelled"."""
        if not self.finished:
            self._cancel()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """The finished output. Raises TimeoutError after `timeout` seconds, and the request's own error."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.finished, timeout):
                raise TimeoutError(f"the request has not finished within {timeout} s")
            return self._checked_now({})

    def __iter__(self) -> Iterator[RequestOutput]:
        version, seen = 0, dict[int, tuple[int, int, int]]()
        while True:
            with self._changed:
                self._changed.wait_for(lambda version=version: self._version > version)  # type: ignore[misc]
                version, output = self._version, self._checked_now(seen)
            yield output
            if output.finished:
                return

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        version, seen = 0, dict[int, tuple[int, int, int]]()
        while True:
            version = await self._version_after(version)
            with self._changed:
                version, output = self._version, self._checked_now(seen)
            yield output
            if output.finished:
                return

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._finished_output().__await__()

    async def aresult(self) -> RequestOutput:
        """The finished output, for a coroutine."""
        return await self._finished_output()

    def __repr__(self) -> str:
        return f"RequestHandle({self._now()!r})"

    def accept(self, response: Any) -> bool:
        """For the dispatcher: takes a response in. True when the response's sequence should be ended."""
        with self._changed:
            stops = self._generated.accept(response)
            if self._streaming or self._generated.finished:
                self._announce()
            return stops

    def fail(self, error: TrtllmError) -> None:
        """For the dispatcher: the request has ended with an error."""
        with self._changed:
            if not self.finished:
                self._error = error
                self._announce()

    def _announce(self) -> None:
        self._version += 1
        self._changed.notify_all()
        wakers, self._wakers = self._wakers, []
        for wake in wakers:
            with contextlib.suppress(RuntimeError):  # its event loop has been closed
                wake()

    def _now(self) -> RequestOutput:
        with self._changed:
            return self._generated.snapshot({})

    def _checked_now(self, seen: dict[int, tuple[int, int, int]]) -> RequestOutput:
        if self._error is not None:
            raise self._error
        return self._generated.snapshot(seen)

    async def _finished_output(self) -> RequestOutput:
        version = 0
        while not self.finished:
            version = await self._version_after(version)
        return self.result(0)

    async def _version_after(self, version: int) -> int:
        loop = asyncio.get_running_loop()
        with self._changed:
            if self._version > version:
                return self._version
            future: asyncio.Future[None] = loop.create_future()
            waker = partial(loop.call_soon_threadsafe, _set, future)
            self._wakers.append(waker)
        try:
            await future
        except asyncio.CancelledError:
            with self._changed, contextlib.suppress(ValueError):
                self._wakers.remove(waker)
            raise
        return self._version


class Dispatcher:
    """Hands requests to the executor, and its responses to their handles, on a thread of its own."""

    def __init__(self, executor: Executor) -> None:
        self._executor: Executor | None = executor
        self._handles: dict[int, RequestHandle] = {}
        self._lock = threading.Lock()
        self._is_closing = False
        self._has_ended = threading.Event()
        self._broken: TrtllmError | None = None
        self._thread = threading.Thread(target=self._run, name="trtllm-dispatcher", daemon=True)
        self._thread.start()

    def submit(self, request: Any, generated: Callable[[int], GeneratedRequest], *, streaming: bool) -> RequestHandle:
        """Enqueues a request; `generated` makes its outputs from its id. Raises UsageError when it is refused."""
        with self._lock:  # no response is looked up before its handle is there
            if self._is_closing:
                raise UsageError("this LLM has been shut down", "make a new one")
            if self._broken is not None:
                raise self._broken
            assert self._executor is not None
            request_id = self._executor.enqueue(request)
            handle = RequestHandle(generated(request_id), partial(self._cancel, request_id), streaming=streaming)
            self._handles[request_id] = handle
            return handle

    @property
    def num_under_way(self) -> int:
        return len(self._handles)

    def shutdown(self, *, finish: bool) -> None:
        """Ends the executor: requests under way finish or are cancelled, and their handles are told. Idempotent."""
        with self._lock:
            self._is_closing = True
            executor = self._executor
        if executor is not None:
            executor.shutdown(finish)
        self._has_ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._executor = None  # handles that live on keep no engine

    def _cancel(self, request_id: int) -> None:
        executor = self._executor
        if executor is not None:
            executor.cancel(request_id)

    def _run(self) -> None:
        executor = self._executor
        assert executor is not None, "the thread starts before anybody can shut down"
        try:
            while not self._has_ended.is_set():
                self._deliver(executor, executor.await_responses(_AWAIT_MS))
            while responses := executor.await_responses(0):
                self._deliver(executor, responses)
            cause = TrtllmError("the LLM was shut down before the request had finished", "shut down with finish=True")
        except BaseException as error:
            cause = TrtllmError(f"the executor failed: {error}", "make a new LLM, and report this as a defect")
            cause.__cause__ = error
        with self._lock:
            self._broken = cause
            abandoned, self._handles = list(self._handles.values()), {}
        for handle in abandoned:
            handle.fail(cause)

    def _deliver(self, executor: Executor, responses: list[Any]) -> None:
        for response in responses:
            with self._lock:
                handle = self._handles.get(response.request_id)
                if handle is not None and response.is_final:
                    del self._handles[response.request_id]
            if handle is not None:
                self._hand_over(executor, handle, response)

    def _hand_over(self, executor: Executor, handle: RequestHandle, response: Any) -> None:
        """One request's trouble is that request's alone."""
        if response.error:
            handle.fail(TrtllmError(response.error, response.error_hint))
            return
        try:
            if handle.accept(response):
                executor.stop_sequence(response.request_id, response.sequence_index)
        except Exception as error:
            cause = TrtllmError(f"an output could not be made: {error}", "report this as a defect")
            cause.__cause__ = error
            handle.fail(cause)
            executor.cancel(response.request_id)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
