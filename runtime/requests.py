"""What a user asks for, checked and put into the executor's terms."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trtllm.errors import UsageError
from trtllm.records import record, setting
from trtllm.runtime.guided_decoding import GuidedDecoder
from trtllm.runtime.llm_config import KvCacheRetentionConfig, NGramDecodingConfig
from trtllm.runtime.sampling import LogitsProcessor, SamplingParams
from trtllm.runtime.sequences import GeneratedRequest
from trtllm.runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or a dict with "prompt" or "prompt_token_ids" and perhaps "cache_salt"."""
_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@record
class RequestOptions:
    """What a call says of a request beside its sampling."""

    cache_salt: str | int | None = None
    """Only requests with the same salt share what was computed."""
    kv_cache_retention_config: KvCacheRetentionConfig | None = None
    priority: float = setting(default=0.5, at_least=0, at_most=1)
    allotted_time_ms: int | None = setting(default=None, at_least=1)
    """Milliseconds from now, after which the request ends with what it has."""


@dataclass(frozen=True)
class EngineLimits:
    """What an engine takes; lengths in tokens."""

    vocab_size: int
    max_input_len: int
    max_seq_len: int
    max_batch_size: int
    """Sequences in a step, which all of a request's must fit into."""
    end_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A request that has been checked as far as it can be before it is queued."""

    native: Any
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    tokenizer: Tokenizer | None

    def generated(self, request_id: int) -> GeneratedRequest:
        """The outputs to be, once the request has its id."""
        return GeneratedRequest(request_id, self.prompt, self.prompt_token_ids, self.params, self.tokenizer)


class RequestMaker:
    """Makes the executor's requests for one engine. Thread safe.

    `new_request` makes an empty `trtllm._native.ExecutorRequest`; `tokenizer` is None when the user wants none.
    """

    def __init__(
        self,
        new_request: Callable[[], Any],
        limits: EngineLimits,
        tokenizer: Tokenizer | None,
        *,
        speculation: object | None = None,
        max_beam_width: int = 1,
        return_perf_metrics: bool = False,
    ) -> None:
        self._new_request = new_request
        self._limits = limits
        self._tokenizer = tokenizer
        self._speculation = speculation
        self._max_beam_width = max_beam_width
        self._return_perf_metrics = return_perf_metrics
        self._guided = GuidedDecoder(
            tokenizer.vocabulary_file if tokenizer else None, limits.vocab_size, limits.end_ids
        )

    def make(
        self, prompt: Prompt, params: SamplingParams, options: RequestOptions, *, streaming: bool = False
    ) -> PreparedRequest:
        """A checked request. Raises UsageError, for this prompt alone."""
        if streaming and params.num_sampled > params.n:
            raise UsageError("best_of > n cannot stream: the best are known at the end", "set streaming to false")
        text, ids, options = self._tokens(prompt, params, options)
        self._check_tokens(ids)
        native = self._new_request()
        native.input_token_ids = ids
        native.max_tokens = params.max_tokens
        native.streaming = (streaming or bool(params.stop_strings)) and not params.use_beam_search
        self._set_sampling(native, params)
        self._set_ends(native, params)
        self._set_biases(native, params)
        self._set_results(native, params)
        self._set_callbacks(native, params)
        _set_options(native, options)
        if self._return_perf_metrics:
            params = replace(params, return_perf_metrics=True)
        decodes = (params.detokenize or params.stop_strings) and self._tokenizer is not None
        return PreparedRequest(native, text, ids, params, self._tokenizer if decodes else None)

    def _tokens(
        self, prompt: Any, params: SamplingParams, options: RequestOptions
    ) -> tuple[str | None, list[int], RequestOptions]:
        """The prompt's text, if it came as one, its tokens, and the options with what the prompt says."""
        if isinstance(prompt, Mapping):
            prompt, options = _of_mapping(prompt, options)
        if isinstance(prompt, str):
            ids = self._needed_tokenizer("a text as prompt").encode(prompt, params.add_special_tokens)
        else:
            ids = _token_ids(prompt)
        kept = params.truncate_prompt_tokens
        return prompt if isinstance(prompt, str) else None, ids[-kept:] if kept else ids, options

    def _check_tokens(self, ids: list[int]) -> None:
        limits = self._limits
        longest = min(limits.max_input_len, limits.max_seq_len - 1)
        if not ids:
            raise UsageError("a prompt is empty", "give at least one token")
        if len(ids) > longest:
            raise UsageError(
                f"a prompt has {len(ids)} tokens, the engine takes {longest}",
                "shorten it, set truncate_prompt_tokens, or rebuild with a larger --max-seq-len",
            )
        outside = next((token for token in ids if not 0 <= token < limits.vocab_size), None)
        if outside is not None:
            raise UsageError(
                f"token id {outside} is outside the vocabulary of {limits.vocab_size}", "use this engine's tokenizer"
            )

    def _needed_tokenizer(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise UsageError(
                f"{what} needs a tokenizer, and skip_tokenizer_init was given", "pass token ids, or make the LLM anew"
            )
        return self._tokenizer

    def _set_sampling(self, native: Any, params: SamplingParams) -> None:
        if params.use_beam_search and params.num_sampled > self._max_beam_width:
            raise UsageError(
                f"beam width {params.num_sampled} exceeds max_beam_width {self._max_beam_width} of this LLM",
                f"make the LLM with max_beam_width={params.num_sampled}",
            )
        if params.num_sampled > self._limits.max_batch_size:
            raise UsageError(
                f"{params.num_sampled} sequences of one prompt exceed max_batch_size {self._limits.max_batch_size}",
                "ask for fewer, or make the LLM with a larger max_batch_size",
            )
        native.beam_width = params.num_sampled if params.use_beam_search else 1
        native.num_return_sequences = params.n if params.use_beam_search else params.num_sampled
        native.top_k = 1 if params.is_greedy else params.top_k or 0
        native.temperature = 1.0 if params.is_greedy or params.temperature is None else params.temperature
        native.top_p = 1.0 if params.is_greedy or params.top_p is None else params.top_p
        for name, value in (
            ("top_p_min", params.top_p_min),
            ("top_p_decay", params.top_p_decay),
            ("top_p_reset_id", params.top_p_reset_ids),
            ("min_p", params.min_p),
            ("seed", params.seed),
            ("repetition_penalty", params.repetition_penalty),
            ("presence_penalty", params.presence_penalty),
            ("frequency_penalty", params.frequency_penalty),
            ("prompt_ignore_length", params.prompt_ignore_length),
            ("min_tokens", params.min_tokens),
            ("no_repeat_ngram_size", params.no_repeat_ngram_size),
            ("length_penalty", params.length_penalty),
            ("early_stopping", params.early_stopping),
            ("beam_search_diversity_rate", params.beam_search_diversity_rate),
            ("beam_width_array", params.beam_width_array),
        ):
            if value is not None:
                setattr(native, name, value)

    def _set_ends(self, native: Any, params: SamplingParams) -> None:
        if params.stop_strings:
            self._needed_tokenizer("stop strings")
        native.end_ids = self._end_ids(params)
        native.bad_words = [[token] for token in params.bad_token_ids or ()] + self._bad_words(params.bad_strings)

    def _end_ids(self, params: SamplingParams) -> list[int]:
        own = [] if params.ignore_eos else self._limits.end_ids
        if params.end_id is not None and not params.ignore_eos:
            own = [params.end_id] if params.end_id >= 0 else []  # -1: none, as in the reference
        return list(dict.fromkeys([*own, *(params.stop_token_ids or ())]))

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Tokens of each word at the beginning of a text, and in its middle."""
        if not words:
            return []
        tokenizer = self._needed_tokenizer("bad words")
        spelled = [word for text in words for word in (text, f" {text.lstrip()}")]
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in spelled]
        return [list(ids) for ids in dict.fromkeys(tuple(ids) for ids in encoded if ids)]

    def _set_biases(self, native: Any, params: SamplingParams) -> None:
        size = self._limits.vocab_size
        outside = [token for token in params.logit_bias or () if not 0 <= token < size]
        if outside:
            raise UsageError(f"logit_bias: token id {outside[0]} is outside the vocabulary of {size}", "correct it")
        native.logit_bias = list((params.logit_bias or {}).items())
        if params.embedding_bias is not None:
            bias = np.ascontiguousarray(params.embedding_bias, np.float32)
            if bias.shape != (size,):
                raise UsageError(f"embedding_bias has {bias.size} numbers, the vocabulary {size}", "give one a token")
            native.embedding_bias = bias

    def _set_results(self, native: Any, params: SamplingParams) -> None:
        native.num_logprobs = params.logprobs or 0 if params.sums_logprobs else -1
        native.num_prompt_logprobs = -1 if params.prompt_logprobs is None else params.prompt_logprobs
        native.return_context_logits = params.return_context_logits
        native.return_generation_logits = params.return_generation_logits

    def _set_callbacks(self, native: Any, params: SamplingParams) -> None:
        if params.lookahead_config is not None and not isinstance(self._speculation, NGramDecodingConfig):
            raise UsageError(
                "lookahead_config needs an LLM that drafts",
                "make the LLM with speculative_config=NGramDecodingConfig(...)",
            )
        if params.logits_processors:
            native.logits_processor = _chained(params.logits_processors)
        native.apply_batched_logits_processor = params.apply_batched_logits_processor
        if params.guided_decoding is not None:
            self._needed_tokenizer("guided decoding")
            native.constraint = self._guided.constraint(params.guided_decoding, self._end_ids(params))


def _of_mapping(prompt: Mapping[str, Any], options: RequestOptions) -> tuple[Any, RequestOptions]:
    unknown = [key for key in prompt if key not in _PROMPT_KEYS]
    if "prompt_token_ids" not in prompt and "prompt" not in prompt:
        raise UsageError("a prompt dict has neither 'prompt' nor 'prompt_token_ids'", "give one of them")
    if unknown:
        raise UsageError(f"a prompt dict has '{unknown[0]}'", f"known keys: {', '.join(_PROMPT_KEYS)}")
    if prompt.get("cache_salt") is not None:
        others = {
            name: getattr(options, name) for name in ("kv_cache_retention_config", "priority", "allotted_time_ms")
        }
        options = RequestOptions(cache_salt=prompt["cache_salt"], **others)
    ids = prompt.get("prompt_token_ids")
    return (prompt["prompt"] if ids is None else ids), options


def _token_ids(prompt: Any) -> list[int]:
    try:
        if isinstance(prompt, bytes):
            raise TypeError
        return [token.__index__() for token in prompt]
    except (TypeError, AttributeError):
        shown = repr(prompt)[:60]
        raise UsageError(f"a prompt is {shown}", "pass a string, token ids, or a dict with one of them") from None


def _set_options(native: Any, options: RequestOptions) -> None:
    native.priority = options.priority
    native.allotted_time_ms = options.allotted_time_ms
    if options.cache_salt is not None:
        native.cache_salt = _salt(options.cache_salt)
    retention = options.kv_cache_retention_config
    if retention is not None:
        native.retention_ranges = [
            (item.token_start, -1 if item.token_end is None else item.token_end, item.priority, item.duration_ms)
            for item in retention.token_range_retention_configs or ()
        ]
        native.decode_priority = retention.decode_retention_priority
        native.decode_duration_ms = retention.decode_duration_ms


def _salt(salt: str | int) -> int:
    """64 bits that stand for a salt; never 0, which stands for none."""
    digest = hashlib.sha256(repr(salt).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "little") or 1


def _chained(processors: Sequence[LogitsProcessor]) -> LogitsProcessor:
    if len(processors) == 1:
        return processors[0]

    def run_all(request_id: int, sequence: int, tokens: list[int], logits: np.ndarray) -> None:
        for processor in processors:
            processor(request_id, sequence, tokens, logits)

    return run_all
