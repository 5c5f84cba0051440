"""What a request asks of the decoder, and picking the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trtllm.errors import UsageError


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when generation ends. Names and defaults are the reference `SamplingParams`.

    Greedy unless temperature, top_k or top_p is given; temperature 0 and top_k 1 are greedy too. `max_tokens` counts
    new tokens. `stop` strings end the text before them (after them with `include_stop_str_in_output`).
    """

    max_tokens: int = 32
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    end_id: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        problems = [
            text
            for broken, text in (
                (self.max_tokens < 1, f"max_tokens is {self.max_tokens}, must be at least 1"),
                (_below(self.temperature, 0.0), f"temperature is {self.temperature}, must not be negative"),
                (_below(self.top_k, 0), f"top_k is {self.top_k}, must be 0 (all) or more"),
                (
                    self.top_p is not None and not 0.0 < self.top_p <= 1.0,
                    f"top_p is {self.top_p}, must be above 0 and at most 1",
                ),
            )
            if broken
        ]
        if problems:
            raise UsageError("; ".join(problems), "see SamplingParams for the ranges")

    @property
    def is_greedy(self) -> bool:
        if self.temperature == 0.0 or self.top_k == 1:
            return True
        return self.temperature is None and not self.top_k and self.top_p is None

    @property
    def stop_strings(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else [text for text in self.stop if text]


def _below(value: float | None, least: float) -> bool:
    return value is not None and value < least


class Sampler:
    """Picks tokens for one request; the same seed gives the same tokens, whatever else is in the batch."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._random = np.random.default_rng(params.seed if params.seed is not None else 0)

    def pick(self, logits: np.ndarray) -> int:
        """The next token from float32 logits [V]."""
        if self._params.is_greedy:
            return int(np.argmax(logits))
        candidates, scores = _candidates(logits, self._params)
        weights = np.exp(scores - scores[0])
        cumulative = np.cumsum(weights / weights.sum())
        return int(candidates[np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")])


def _candidates(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Token ids that top_k and top_p leave, best first, and their scaled logits in float64."""
    temperature = 1.0 if params.temperature is None else params.temperature
    kept = min(params.top_k or logits.size, logits.size)
    chosen = np.argpartition(logits, -kept)[-kept:] if kept < logits.size else np.arange(logits.size)
    chosen = chosen[np.lexsort((chosen, -logits[chosen]))]
    scores = logits[chosen].astype(np.float64) / temperature
    if params.top_p is not None and params.top_p < 1.0:
        weights = np.exp(scores - scores[0])
        cumulative = np.cumsum(weights) / weights.sum()
        count = int(np.searchsorted(cumulative, params.top_p)) + 1
        chosen, scores = chosen[:count], scores[:count]
    return chosen, scores
