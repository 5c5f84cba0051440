"""Generation as users call it: one model, many requests, from any thread or event loop."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from trtllm.compiler.engine import MANIFEST, Engine, open_engine
from trtllm.compiler.engine import writing as writing_engine
from trtllm.errors import TrtllmError, UsageError
from trtllm.progress import Progress, Silent
from trtllm.runtime.batches import outputs_in_order
from trtllm.runtime.dispatcher import Dispatcher, RequestHandle
from trtllm.runtime.embedder import Embedder
from trtllm.runtime.executor import new_executor, new_request, open_engine_session
from trtllm.runtime.llm_config import KvCacheRetentionConfig, LlmArgs, llm_args
from trtllm.runtime.opening import draft_session, engine_of, tokenizer_of
from trtllm.runtime.outputs import RequestOutput
from trtllm.runtime.progress_line import ProgressLine
from trtllm.runtime.refitting import InFlight, LiveRefit, RefittedEngine, exchange_weights, make_refitted
from trtllm.runtime.requests import EngineLimits, PreparedRequest, Prompt, RequestMaker, RequestOptions
from trtllm.runtime.sampling import SamplingParams
from trtllm.runtime.tokenizer import Tokenizer

Message = Mapping[str, Any]
Conversation = Sequence[Message]
_STATS_POLL_SECONDS = 0.01


class LLM:
    """A loaded model.

    Args:
        model: an engine directory, an `Engine`, or a model (path, hub id, transformers object), for which an engine is
            taken from the engine cache or built into it.
        tokenizer: another tokenizer than the engine's: a directory with its files or a `Tokenizer`. For a model in
            memory, its transformers tokenizer.
        progress: told of a build.
        arguments: the fields of `LlmArgs`, by name; docs/llm-api.md describes them.

    Use it as a context manager, or call `shutdown` when done. All methods may be called from several threads at once.
    Raises UsageError for an unknown or unfit argument, and what loading or building the model raises.
    """

    def __init__(
        self, model: str | Path | Engine | object, *, tokenizer: Any = None, progress: Progress | None = None,
        **arguments: Any,
    ) -> None:  # fmt: skip
        args = llm_args(arguments)
        self.llm_id = f"llm-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.engine = engine_of(model, tokenizer, args, progress or Silent())
        self._args = args
        self._embedder: Embedder | None = None
        self._dispatcher: Dispatcher | None = None
        self._refit_lock = threading.Lock()
        self._refitted: RefittedEngine | None = None
        self._tokenizer = None if args.skip_tokenizer_init else tokenizer_of(self.engine, tokenizer)
        if self.engine.config["model"]["kind"] == "encoder":
            self._embedder = Embedder(self.engine, threads=args.threads)
        else:
            self._open_executor(args)

    def _open_executor(self, args: LlmArgs) -> None:
        session = self._session = open_engine_session(self.engine, args)
        self._executor = new_executor(session, args, draft_session=draft_session(args))
        self._dispatcher = Dispatcher(self._executor)
        queue = args.scheduler_config.max_queue_size if args.scheduler_config else None
        self._max_in_flight = min(max(16, 4 * session.info.max_batch_size), 1 << 30 if queue is None else max(queue, 1))
        info, build = session.info, self.engine.config["build_config"]
        max_seq_len = min(args.max_seq_len or info.max_seq_len, info.max_seq_len)
        limits = EngineLimits(
            info.vocab_size,
            min(args.max_input_len or build["max_input_len"], max_seq_len - 1),
            max_seq_len,
            info.max_batch_size,
            self._tokenizer.eos_token_ids
            if self._tokenizer
            else Tokenizer.from_directory(self.engine.path).eos_token_ids,
        )
        self._maker = RequestMaker(
            new_request,
            limits,
            self._tokenizer,
            speculation=args.speculative_config,
            max_beam_width=args.max_beam_width,
            return_perf_metrics=args.return_perf_metrics,
        )
        self._finalizer = weakref.finalize(self, _close, self._dispatcher)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UsageError with `skip_tokenizer_init`."""
        if self._tokenizer is None:
            raise UsageError("this LLM has no tokenizer: skip_tokenizer_init was given", "make the LLM without it")
        return self._tokenizer

    @property
    def workspace(self) -> Path:
        """The engine directory."""
        return self.engine.path

    def generate(
        self,
        inputs: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        cache_salt: str | int | None = None,
        kv_cache_retention_config: KvCacheRetentionConfig | None = None,
        priority: float = 0.5,
        allotted_time_ms: int | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Generates for one prompt (one RequestOutput) or a list of prompts (a list, in their order).

        A prompt is a string, token ids, or a dict with "prompt" or "prompt_token_ids" and perhaps "cache_salt".
        `sampling_params` are for all prompts or one for each. `use_tqdm` shows the progress on standard error. Every
        prompt is checked before the first is started. Raises UsageError for a request that cannot be served, and
        TrtllmError when one fails.
        """
        options = RequestOptions(cache_salt, kv_cache_retention_config, priority, allotted_time_ms)
        single = _is_single(inputs)
        prompts: list[Any] = [inputs] if single else list(inputs)
        params = _params_for(prompts, sampling_params)
        maker = self._live_maker()
        requests = [maker.make(prompt, own, options) for prompt, own in zip(prompts, params, strict=True)]
        progress = ProgressLine("generated", len(requests)) if use_tqdm else Silent()
        outputs = list(self._in_order(requests, self._max_in_flight, progress, on_error="raise"))
        return outputs[0] if single else outputs

    def generate_async(
        self,
        inputs: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        cache_salt: str | int | None = None,
        kv_cache_retention_config: KvCacheRetentionConfig | None = None,
        priority: float = 0.5,
        allotted_time_ms: int | None = None,
    ) -> RequestHandle:
        """Starts one request and returns at once; `await` the handle, iterate over it, or call `result`.

        Only with `streaming` does an iteration see outputs as they grow.
        """
        options = RequestOptions(cache_salt, kv_cache_retention_config, priority, allotted_time_ms)
        params = sampling_params or SamplingParams()
        return self._submit(self._live_maker().make(inputs, params, options, streaming=streaming), streaming=streaming)

    def stream(
        self, inputs: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> Iterator[RequestOutput]:
        """Generates for one prompt and yields its output as it grows: see `text_diff`. Leaving the loop ends it."""
        handle = self.generate_async(inputs, sampling_params, streaming=True, **options)
        return _until_left(handle)

    def batch(
        self,
        prompts: Iterable[Prompt],
        sampling_params: SamplingParams | None = None,
        *,
        max_in_flight: int | None = None,
        on_error: str = "raise",
        progress: Progress | None = None,
        cache_salt: str | int | None = None,
        priority: float = 0.5,
    ) -> Iterator[RequestOutput]:
        """Generates for any number of prompts and yields the outputs in their order, in bounded memory.

        At most `max_in_flight` prompts are taken from the iterable ahead of the output that is yielded, by default four
        times the engine's batch size. With `on_error="return"` a prompt that cannot be served gives a RequestOutput
        with `error`, instead of raising. Leaving the loop ends what is under way.
        """
        if on_error not in ("raise", "return"):
            raise UsageError(f"on_error is {on_error!r}", 'give "raise" or "return"')
        if max_in_flight is not None and max_in_flight < 1:
            raise UsageError(f"max_in_flight is {max_in_flight}, must be at least 1", "leave it out for the default")
        options = RequestOptions(cache_salt=cache_salt, priority=priority)
        params, maker = sampling_params or SamplingParams(), self._live_maker()

        def requests() -> Iterator[PreparedRequest | TrtllmError]:
            for prompt in prompts:
                try:
                    yield maker.make(prompt, params, options)
                except TrtllmError as error:
                    yield error

        ahead = max_in_flight or self._max_in_flight
        return self._in_order(requests(), ahead, progress or Silent(), on_error=on_error)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = False,
    ) -> RequestOutput | list[RequestOutput]:
        """Answers one conversation (a list of {"role", "content"}) or a list of conversations.

        `chat_template_kwargs` go to the template by name, such as `{"enable_thinking": False}`.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts = [self._chat_ids(each, tools, add_generation_prompt, chat_template_kwargs) for each in conversations]
        outputs = self.generate(prompts, sampling_params, use_tqdm=use_tqdm)
        assert isinstance(outputs, list)
        return outputs[0] if single else outputs

    def chat_async(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> RequestHandle:
        """Starts the answer to one conversation; `options` are those of `generate_async`."""
        ids = self._chat_ids(messages, tools, add_generation_prompt, chat_template_kwargs)
        return self.generate_async(ids, sampling_params, streaming=streaming, **options)

    def embed(self, inputs: str | Sequence[str] | Sequence[Sequence[int]]) -> np.ndarray:
        """One vector a text, or a list of token ids: float32 [N, size]; a single string gives N = 1.

        Raises UsageError when the engine is no encoder.
        """
        if self._embedder is None:
            raise UsageError(
                f"{self.engine.path} is a decoder, which generates", "build an encoder model for embeddings"
            )
        if isinstance(inputs, str) or all(isinstance(text, str) for text in inputs):
            return self._embedder.embed(inputs)  # type: ignore[arg-type]
        return self._embedder.embed_tokens(inputs)  # type: ignore[arg-type]

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self.tokenizer.encode(text, add_special_tokens)

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def get_stats(self, timeout: float | None = 2.0) -> list[dict[str, Any]]:
        """Statistics of the steps since the last call, with the reference names; waits up to `timeout` seconds."""
        return self._awaited("iteration_stats", timeout)

    async def get_stats_async(self, timeout: float | None = 2.0) -> list[dict[str, Any]]:
        """The same, for a coroutine."""
        return await asyncio.to_thread(self.get_stats, timeout)

    def get_request_stats(self) -> list[dict[str, Any]]:
        """Statistics of the requests of each step since the last call; needs request_stats_max_iterations."""
        return self._awaited("request_stats", None)

    def get_kv_cache_events(self, timeout: float | None = 2.0) -> list[dict[str, Any]]:
        """What the cache stored and removed since the last call; needs KvCacheConfig(event_buffer_max_size=...)."""
        return self._awaited("kv_cache_events", timeout)

    async def get_kv_cache_events_async(self, timeout: float | None = 2.0) -> list[dict[str, Any]]:
        """The same, for a coroutine."""
        return await asyncio.to_thread(self.get_kv_cache_events, timeout)

    def save(self, engine_dir: str | Path) -> Path:
        """Copies the checked engine directory to a path where nothing is; all of it appears there, or nothing."""
        target = Path(engine_dir)
        engine = open_engine(self.engine.path, verify=True)
        with writing_engine(target) as writer:
            for name in (*engine.manifest.files, MANIFEST):
                shutil.copyfile(engine.path / name, writer.folder / name)
            open_engine(writer.folder, verify=True)
        return target

    def export_trace(self, path: str | Path) -> Path:
        """Writes the newest events as a Chrome trace, which Perfetto shows; needs perf_trace_max_events."""
        if not self._args.perf_trace_max_events:
            raise UsageError("no trace is recorded", "make the LLM with perf_trace_max_events=100000")
        self._live()
        Path(path).write_text(self._executor.trace_json(), encoding="utf-8")
        return Path(path)

    def check(self) -> None:
        """Proves that the executor's books balance; when nothing is under way, that every cache block came back."""
        self._live()
        self._executor.check()

    def refit(
        self,
        model: Any = None,
        *,
        in_flight: InFlight = "finish",
        base: Any = None,
        strength: float = 1.0,
        partial: bool = False,
        revert: bool = False,
        recalibrate: bool = False,
        verify: bool = False,
        output_dir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Engine:
        """Changes the weights while requests are served; returns the engine with the new ones.

        Args:
            model: what a build takes, a dict of numpy arrays or torch tensors by their Hugging Face names (some of them
                or all), or the directory of a LoRA adapter, which is merged into `base` at `strength`.
            in_flight: "finish": requests under way end on the old weights, those that wait begin with the new ones.
                "recompute": they go on with the tokens they have, whose cache is computed anew by the new weights;
                beam searches end first. No step mixes the two, and nothing of the old cache is reused.
            partial: a checkpoint may lack tensors, whose weights stay. revert: back to the weights of the build.
            recalibrate: calibrate the new weights on the tokens of the build, where the engine's scheme needs it.
            verify: compare with a fresh build first, as trtllm-refit does.
            output_dir: where the engine stays; otherwise it goes with this object.

        Raises what does not fit or fails to load; then requests go on with the old weights.
        """
        wanted = LiveRefit(
            model, in_flight, base, strength, partial, revert, recalibrate, verify, output_dir, self._args.threads or 0
        )
        with self._refit_lock:
            if self._embedder is None:
                self._live()
            made = make_refitted(self.engine, wanted, progress or Silent())
            try:
                if self._embedder is not None:
                    self._embedder.take(made.engine)
                else:
                    exchange_weights(self._executor, self._session, made.engine, in_flight)
            except BaseException:
                made.remove()
                raise
            previous, self._refitted, self.engine = self._refitted, made, made.engine
            if previous is not None:
                previous.remove()
            return self.engine

    def shutdown(self, finish: bool = False) -> None:
        """Ends requests under way, with `finish` only after they have finished, and releases the engine."""
        if self._dispatcher is not None:
            self._dispatcher.shutdown(finish=finish)
            self._finalizer.detach()
            self._dispatcher = None
            del self._executor, self._session
        elif self._embedder is not None:
            self._embedder.shutdown()
        if self._refitted is not None:
            self._refitted.remove()
            self._refitted = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _live(self) -> Dispatcher:
        if self._embedder is not None:
            raise UsageError(f"{self.engine.path} is an encoder, which does not generate", "use embed")
        if self._dispatcher is None:
            raise UsageError("this LLM has been shut down", "make a new one")
        return self._dispatcher

    def _live_maker(self) -> RequestMaker:
        self._live()
        return self._maker

    def _submit(self, request: PreparedRequest, *, streaming: bool) -> RequestHandle:
        return self._live().submit(request.native, request.generated, streaming=streaming)

    def _in_order(
        self, requests: Iterable[PreparedRequest | TrtllmError], ahead: int, progress: Progress, *, on_error: str
    ) -> Iterator[RequestOutput]:
        def submit(request: PreparedRequest) -> RequestHandle:
            return self._submit(request, streaming=False)

        return outputs_in_order(requests, submit, ahead, progress, returns_errors=on_error == "return")

    def _chat_ids(
        self,
        messages: Conversation,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> list[int]:
        self._live()
        text = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **dict(chat_template_kwargs or {})
        )
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _awaited(self, what: str, timeout: float | None) -> list[dict[str, Any]]:
        deadline = time.monotonic() + (timeout or 0.0)
        while True:
            self._live()
            found = [json.loads(text) for text in getattr(self._executor, f"take_{what}")()]
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(_STATS_POLL_SECONDS)


def _close(dispatcher: Dispatcher) -> None:
    dispatcher.shutdown(finish=False)


def _until_left(handle: RequestHandle) -> Iterator[RequestOutput]:
    try:
        yield from handle
    finally:
        handle.abort()


def _is_single(inputs: Any) -> bool:
    """Whether this is one prompt: a text, a dict, or token ids."""
    if isinstance(inputs, str | Mapping) or not hasattr(inputs, "__len__"):
        return True
    return bool(len(inputs)) and not isinstance(inputs[0], str | Mapping | Sequence | np.ndarray)


def _params_for(prompts: Sequence[Any], given: Any) -> list[SamplingParams]:
    if given is None:
        given = SamplingParams()
    if isinstance(given, SamplingParams):
        return [given] * len(prompts)
    if not isinstance(given, Sequence) or not all(isinstance(params, SamplingParams) for params in given):
        raise UsageError(
            f"sampling_params is a {type(given).__name__}", "pass a SamplingParams, or one for each prompt"
        )
    if len(given) != len(prompts):
        raise UsageError(f"{len(prompts)} prompts but {len(given)} sampling params", "give one, or one for each prompt")
    return list(given)
