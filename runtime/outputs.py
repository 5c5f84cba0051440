"""What a request gives back; field names are the reference ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from trtllm.errors import TrtllmError


class Logprob(NamedTuple):
    """The log probability of a token in the model's own distribution, and its rank there: 1 is the most probable."""

    logprob: float
    rank: int | None = None


TokenLogprobs = list[dict[int, Logprob]]
"""For each token, by token id: the token itself and the most probable alternatives."""


@dataclass(repr=False)
class CompletionOutput:
    """One generated sequence.

    `finish_reason` is "stop", "length", "timeout" or "cancelled", and None while the sequence grows. `stop_reason` is
    the stop string or stop token id that ended it; None when the model's own end token did. While streaming,
    `text_diff`, `token_ids_diff` and `logprobs_diff` are what came since the output was last given.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Of all tokens; None unless log probabilities, the best of several sequences, or a beam search were asked for."""
    logprobs: TokenLogprobs = field(default_factory=list)
    prompt_logprobs: TokenLogprobs = field(default_factory=list)
    """Of the prompt's tokens from the second on."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    generation_logits: np.ndarray | None = None
    """float32 [tokens, vocabulary]"""
    request_perf_metrics: dict[str, Any] | None = None
    _seen: tuple[int, int, int] = (0, 0, 0)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        return self.text[self._seen[0] :]

    @property
    def token_ids_diff(self) -> list[int]:
        return self.token_ids[self._seen[1] :]

    @property
    def logprobs_diff(self) -> TokenLogprobs:
        return self.logprobs[self._seen[2] :]

    def mark_seen(self) -> None:
        """From now on the differences begin here."""
        self._seen = (len(self.text), len(self.token_ids), len(self.logprobs))

    def __repr__(self) -> str:
        shown: dict[str, object] = {"index": self.index, "text": self.text, "token_ids": self.token_ids}
        shown |= {"finish_reason": self.finish_reason, "stop_reason": self.stop_reason}
        if self.cumulative_logprob is not None:
            shown["cumulative_logprob"] = round(self.cumulative_logprob, 4)
        return f"CompletionOutput({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


@dataclass(repr=False)
class RequestOutput:
    """A request and its sequences.

    `error` is set only where a caller asked for errors instead of exceptions (`LLM.batch(..., on_error="return")`).
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    context_logits: np.ndarray | None = None
    """float32 [prompt tokens, vocabulary]"""
    error: TrtllmError | None = None

    def __repr__(self) -> str:
        shown: dict[str, object] = {
            "request_id": self.request_id,
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
        }
        shown |= {"outputs": self.outputs, "finished": self.finished}
        if self.error is not None:
            shown["error"] = self.error.what
        return f"RequestOutput({', '.join(f'{name}={value!r}' for name, value in shown.items())})"
