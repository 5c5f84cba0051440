"""What a request asks of the decoder: names, defaults and meanings are those of the reference `SamplingParams`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trtllm.environment import allows_n_greedy_decoding
from trtllm.records import record, setting
from trtllm.runtime.guided_decoding import GuidedDecodingParams

LogitsProcessor = Callable[[int, int, list[int], np.ndarray], None]
"""Gets request id, sequence index, the tokens so far and float32 logits [V], which it changes in place."""


@record
class LookaheadDecodingConfig:
    """Drafting by looking at n-grams; here the prompt-lookup drafts of `NGramDecodingConfig`."""

    max_window_size: int = setting(default=4, at_least=1)
    max_ngram_size: int = setting(default=3, at_least=1)
    max_verification_set_size: int = setting(default=4, at_least=1)


@record
class SamplingParams:
    """How tokens are chosen and when generation ends. docs/llm-api.md describes every field.

    Greedy unless `temperature`, `top_k` or `top_p` is given; temperature 0, top_k 1 and top_p 0 are greedy too.
    `max_tokens` counts new tokens. `None` is the engine's default. Raises UsageError that lists everything wrong.
    """

    end_id: int | None = setting(default=None, at_least=-1)
    pad_id: int | None = setting(default=None, at_least=-1)
    max_tokens: int = setting(default=32, at_least=1)
    bad: str | list[str] | None = None
    bad_token_ids: list[int] | None = setting(default=None, at_least=0)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = setting(default=None, at_least=0)
    include_stop_str_in_output: bool = False
    embedding_bias: Any = None
    logit_bias: dict[int, float] | None = None
    logits_processor: LogitsProcessor | list[LogitsProcessor] | None = None
    apply_batched_logits_processor: bool = False
    n: int = setting(default=1, at_least=1)
    best_of: int | None = setting(default=None, at_least=1)
    use_beam_search: bool = False
    top_k: int | None = setting(default=None, at_least=0)
    top_p: float | None = setting(default=None, at_least=0, at_most=1)
    top_p_min: float | None = setting(default=None, above=0, at_most=1)
    top_p_reset_ids: int | None = setting(default=None, at_least=0)
    top_p_decay: float | None = setting(default=None, above=0, at_most=1)
    seed: int | None = setting(default=None, at_least=0, at_most=2**64 - 1)
    temperature: float | None = setting(default=None, at_least=0)
    min_tokens: int | None = setting(default=None, at_least=0)
    beam_search_diversity_rate: float | None = setting(default=None, at_least=0)
    repetition_penalty: float | None = setting(default=None, above=0)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    prompt_ignore_length: int | None = setting(default=None, at_least=0)
    length_penalty: float | None = None
    early_stopping: int | None = None
    no_repeat_ngram_size: int | None = setting(default=None, at_least=1)
    min_p: float | None = setting(default=None, at_least=0, at_most=1)
    beam_width_array: list[int] | None = setting(default=None, at_least=1)
    logprobs: int | None = setting(default=None, at_least=0)
    prompt_logprobs: int | None = setting(default=None, at_least=0)
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_encoder_output: bool = False
    return_perf_metrics: bool = False
    additional_model_outputs: list[str] | None = None
    lookahead_config: LookaheadDecodingConfig | None = None
    guided_decoding: GuidedDecodingParams | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = setting(default=None, at_least=1)
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def problems(self) -> Iterator[str]:
        """What is wrong with fields taken together."""
        yield from self._number_problems()
        if self.embedding_bias is not None and not _is_vector(self.embedding_bias):
            yield "embedding_bias must be numbers, one for each token of the vocabulary"
        if self.min_tokens is not None and self.min_tokens > self.max_tokens:
            yield f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}"
        if self.return_encoder_output:
            yield "return_encoder_output is for encoder-decoder models, which engines do not run"
        if self.additional_model_outputs:
            yield f"the engine has no output {', '.join(self.additional_model_outputs)} (additional_model_outputs)"
        if self.beam_width_array and not self.use_beam_search:
            yield "beam_width_array needs use_beam_search"
        if self.lookahead_config and self.use_beam_search:
            yield "lookahead_config does not go with use_beam_search"

    def _number_problems(self) -> Iterator[str]:
        if self.best_of is not None and self.best_of < self.n:
            yield f"best_of {self.best_of} is less than n {self.n}"
        elif not self.use_beam_search and self.is_greedy and self.num_sampled > 1 and not allows_n_greedy_decoding():
            name = "best_of" if (self.best_of or 1) > 1 else "n"
            yield (
                f"{name} {self.num_sampled} with greedy decoding gives the same sequence each time: set temperature, "
                "top_k or top_p, or the environment variable TLLM_ALLOW_N_GREEDY_DECODING=1"
            )

    @property
    def is_greedy(self) -> bool:
        if self.use_beam_search:
            return False
        if self.temperature == 0.0 or self.top_k == 1 or self.top_p == 0.0:
            return True
        return self.temperature is None and self.top_k is None and self.top_p is None

    @property
    def num_sampled(self) -> int:
        """Sequences that are generated, of which the best `n` are returned."""
        return self.best_of or self.n

    @property
    def sums_logprobs(self) -> bool:
        """Whether the log probability of a whole sequence is wanted: by the user, or to tell the best."""
        return self.logprobs is not None or self.use_beam_search or self.num_sampled > self.n

    @property
    def stop_strings(self) -> list[str]:
        return [text for text in _listed(self.stop) if text]

    @property
    def bad_strings(self) -> list[str]:
        return [text for text in _listed(self.bad) if text]

    @property
    def logits_processors(self) -> list[LogitsProcessor]:
        given = self.logits_processor
        return [] if given is None else given if isinstance(given, list) else [given]


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _is_vector(value: Any) -> bool:
    """Whether `value` is a row of finite or infinite numbers: an array, a list, or a torch tensor on the CPU."""
    try:
        vector = np.asarray(value, np.float32)
    except (TypeError, ValueError, RuntimeError):
        return False
    return vector.ndim == 1 and not bool(np.isnan(vector).any())
