"""An executor that answers what a test tells it to, in Python alone."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class Response:
    """As `trtllm._native.ExecutorResponse`."""

    request_id: int
    sequence_index: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, float, int]] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float, int]]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str = ""
    stop_token: int | None = None
    stop_word_length: int = 0
    is_sequence_final: bool = False
    is_final: bool = False
    error: str = ""
    error_hint: str = ""
    prompt_logprobs: list[tuple[int, float, int]] = field(default_factory=list)
    top_prompt_logprobs: list[list[tuple[int, float, int]]] = field(default_factory=list)
    context_logits: Any = None
    generation_logits: Any = None
    perf_metrics: dict[str, Any] | None = None


class FakeExecutor:
    """Keeps requests; a test says what comes back. Ends a sequence that is stopped or cancelled, unless `is_deaf`."""

    def __init__(self, *, is_deaf: bool = False) -> None:
        self.requests: dict[int, Any] = {}
        self.stopped: list[tuple[int, int]] = []
        self.cancelled: list[int] = []
        self.failure: BaseException | None = None
        self._is_deaf = is_deaf
        self._ids = itertools.count(1)
        self._responses: deque[Response] = deque()
        self._news = threading.Condition()
        self._has_ended = False

    def enqueue(self, request: Any) -> int:
        request_id = next(self._ids)
        self.requests[request_id] = request
        return request_id

    def say(self, request_id: int, tokens: list[int] | None = None, **fields: Any) -> None:
        """A response arrives."""
        self._push(Response(request_id, token_ids=list(tokens or ()), **fields))

    def end(self, request_id: int, reason: str = "length", tokens: list[int] | None = None, **fields: Any) -> None:
        """The last response of a request with one sequence."""
        self.say(request_id, tokens, finish_reason=reason, is_sequence_final=True, is_final=True, **fields)

    def fail(self, error: BaseException) -> None:
        """From now on waiting for responses raises."""
        with self._news:
            self.failure = error
            self._news.notify_all()

    def await_responses(self, timeout_ms: int) -> list[Response]:
        with self._news:
            self._news.wait_for(lambda: self._responses or self._has_ended or self.failure, timeout_ms / 1000)
            if self.failure is not None:
                raise self.failure
            taken, self._responses = list(self._responses), deque()
            return taken

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)
        if not self._is_deaf:
            self.end(request_id, "cancelled")

    def stop_sequence(self, request_id: int, sequence_index: int) -> None:
        self.stopped.append((request_id, sequence_index))
        if not self._is_deaf:
            self.end(request_id, "stopped", sequence_index=sequence_index)

    def shutdown(self, finish: bool) -> None:
        with self._news:
            self._has_ended = True
            self._news.notify_all()

    def _push(self, response: Response) -> None:
        with self._news:
            self._responses.append(response)
            self._news.notify_all()


def new_request() -> SimpleNamespace:
    """An empty request whose attributes are those that were set."""
    return SimpleNamespace()
