"""Many requests one after the other: outputs in their order, while a bounded number is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from trtllm.errors import TrtllmError
from trtllm.progress import Progress
from trtllm.runtime.dispatcher import RequestHandle
from trtllm.runtime.outputs import RequestOutput
from trtllm.runtime.requests import PreparedRequest

Started = RequestHandle | TrtllmError
"""A request under way, or why it is not."""


def outputs_in_order(
    requests: Iterable[PreparedRequest | TrtllmError],
    submit: Callable[[PreparedRequest], RequestHandle],
    max_in_flight: int,
    progress: Progress,
    *,
    returns_errors: bool,
) -> Iterator[RequestOutput]:
    """Submits requests, at most `max_in_flight` ahead of the output that is yielded.

    An error raises where its output would come, or with `returns_errors` comes as an output. When the iteration ends
    early, what is under way is aborted.
    """
    under_way: deque[Started] = deque()
    try:
        for request in requests:
            if len(under_way) >= max_in_flight:
                yield _next_output(under_way, progress, returns_errors)
            under_way.append(_started(request, submit))
        while under_way:
            yield _next_output(under_way, progress, returns_errors)
    finally:
        for started in under_way:
            if isinstance(started, RequestHandle):
                started.abort()


def _started(request: PreparedRequest | TrtllmError, submit: Callable[[PreparedRequest], RequestHandle]) -> Started:
    try:
        return request if isinstance(request, TrtllmError) else submit(request)
    except TrtllmError as error:
        return error


def _next_output(under_way: deque[Started], progress: Progress, returns_errors: bool) -> RequestOutput:
    started = under_way[0]
    try:
        if isinstance(started, TrtllmError):
            raise started
        output = started.result()
    except TrtllmError as error:
        if not returns_errors:
            raise
        output = _failed(started, error)
    under_way.popleft()
    progress.advance(1)
    return output


def _failed(started: Started, error: TrtllmError) -> RequestOutput:
    if isinstance(started, TrtllmError):
        return RequestOutput(-1, None, [], [], finished=True, error=error)
    return RequestOutput(started.request_id, started.prompt, started.prompt_token_ids, [], finished=True, error=error)
