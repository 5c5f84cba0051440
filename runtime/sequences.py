"""What becomes of one request: the executor's news are turned into text, log probabilities and reasons to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trtllm.runtime.detokenizer import IncrementalDetokenizer
from trtllm.runtime.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from trtllm.runtime.sampling import SamplingParams
from trtllm.runtime.stop_strings import StopHit, StopStringFinder
from trtllm.runtime.tokenizer import Tokenizer

_FINISH_REASONS = {
    "end_id": "stop",
    "stop_words": "stop",
    "stopped": "stop",
    "length": "length",
    "timed_out": "timeout",
    "cancelled": "cancelled",
}


class GeneratedSequence:
    """One sequence: its output so far, and the text that is held back. `tokenizer` is None when nothing is decoded."""

    def __init__(self, index: int, prompt: Sequence[int], params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.output = CompletionOutput(index)
        self._params = params
        self._stopped = False
        self._generated = 0
        self._detokenizer: IncrementalDetokenizer | None = None
        self._finder = StopStringFinder(params.stop_strings, include_in_output=params.include_stop_str_in_output)
        if tokenizer is not None:
            self._detokenizer = IncrementalDetokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        if not params.exclude_input_from_output:
            self._include(prompt)

    def accept(self, response: Any) -> bool:
        """Takes a response in; True when a stop string was found just now, so that the sequence should be ended."""
        was_stopped = self._stopped
        if not self._stopped:
            self._take_tokens(response)
        if response.is_sequence_final:
            self._finish(response)
        return self._stopped and not was_stopped and not response.is_sequence_final

    def _include(self, prompt: Sequence[int]) -> None:
        self.output.token_ids += prompt
        if self._detokenizer is not None:
            self._show("".join(self._detokenizer.push(token) for token in prompt))

    def _take_tokens(self, response: Any) -> None:
        output, logprobs = self.output, response.logprobs
        top = response.top_logprobs
        pieces: list[str] = []
        for place, token in enumerate(response.token_ids):
            output.token_ids.append(token)
            self._generated += 1
            if logprobs and self._params.logprobs is not None:
                output.logprobs.append(_logprob_dict(logprobs[place], top[place] if top else ()))
            if self._detokenizer is not None and self._feed(self._detokenizer.push(token), pieces):
                break
        self._show("".join(pieces))
        if self._params.sums_logprobs:
            dropped = logprobs[place + 1 :] if response.token_ids else ()
            output.cumulative_logprob = response.cumulative_logprob - sum(logprob for _, logprob, _ in dropped)

    def _feed(self, text: str, pieces: list[str]) -> bool:
        """Adds the text that may be shown; True when a stop string is complete."""
        if not text:
            return False
        if self._generated < (self._params.min_tokens or 0):
            pieces.append(self._finder.flush() + text)
            return False
        news = self._finder.feed(text)
        if isinstance(news, StopHit):
            pieces.append(news.text)
            self._stopped = True
            self.output.stop_reason = news.stop
            return True
        pieces.append(news)
        return False

    def _finish(self, response: Any) -> None:
        output = self.output
        if self._detokenizer is not None and not self._stopped:
            pieces: list[str] = []
            if not self._feed(self._detokenizer.flush(), pieces):
                pieces.append(self._finder.flush())
            self._show("".join(pieces))
        if self._stopped:
            output.finish_reason = "stop"
        else:
            output.finish_reason = _FINISH_REASONS[response.finish_reason]
            named = response.stop_token in (self._params.stop_token_ids or ())
            output.stop_reason = response.stop_token if named else None
        logits = response.generation_logits  # asked for once: the response hands its memory over
        if logits is not None:
            output.generation_logits = logits[: self._generated]

    def _show(self, text: str) -> None:
        if text and self._params.detokenize:
            self.output.text += text


class GeneratedRequest:
    """All sequences of a request. The caller sees to it that one thread at a time is in it."""

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self._params = params
        self._prompt_logprobs: TokenLogprobs = []
        self._result = RequestOutput(request_id, prompt, prompt_token_ids, [])
        count = params.n if params.use_beam_search else params.num_sampled
        self._sequences = [GeneratedSequence(index, prompt_token_ids, params, tokenizer) for index in range(count)]

    @property
    def finished(self) -> bool:
        return self._result.finished

    @property
    def shows_progress(self) -> bool:
        """Whether the outputs mean something before the end: the best of many are known at the end."""
        return not self._params.use_beam_search and self._params.num_sampled == self._params.n

    def accept(self, response: Any) -> bool:
        """Takes a response in; True when its sequence should be ended because of a stop string."""
        logits = response.context_logits  # asked for once: the response hands its memory over
        if logits is not None:
            self._result.context_logits = logits
        if response.prompt_logprobs:
            self._take_prompt_logprobs(response)
        sequence = self._sequences[response.sequence_index]
        stops = sequence.accept(response)
        if response.is_final:
            self._finish(response.perf_metrics)
        return stops

    def snapshot(self, seen: dict[int, tuple[int, int, int]]) -> RequestOutput:
        """The outputs now, as copies whose differences begin where `seen` says; `seen` is brought up to date."""
        outputs = []
        for output in self._result.outputs if self.finished else [sequence.output for sequence in self._sequences]:
            copy = replace(output, token_ids=list(output.token_ids), logprobs=list(output.logprobs))
            copy._seen = seen.get(output.index, (0, 0, 0))
            seen[output.index] = (len(output.text), len(output.token_ids), len(output.logprobs))
            outputs.append(copy)
        return replace(self._result, outputs=outputs)

    def _take_prompt_logprobs(self, response: Any) -> None:
        top = response.top_prompt_logprobs
        self._prompt_logprobs = [
            _logprob_dict(chosen, top[place] if top else ()) for place, chosen in enumerate(response.prompt_logprobs)
        ]

    def _finish(self, perf_metrics: dict[str, Any] | None) -> None:
        outputs = [sequence.output for sequence in self._sequences]
        if len(outputs) > self._params.n:
            outputs.sort(key=lambda output: output.cumulative_logprob or 0.0, reverse=True)
            outputs = [replace(output, index=index) for index, output in enumerate(outputs[: self._params.n])]
        for output in outputs:
            output.prompt_logprobs = self._prompt_logprobs
            output.request_perf_metrics = perf_metrics if self._params.return_perf_metrics else None
        self._result.outputs = outputs
        self._result.finished = True


def _logprob_dict(chosen: tuple[int, float, int], top: Sequence[tuple[int, float, int]]) -> dict[int, Logprob]:
    return {token: Logprob(logprob, rank) for token, logprob, rank in (chosen, *top)}
