"""Generation from an engine directory, as users call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from trtllm.compiler.engine import Engine, open_engine
from trtllm.errors import UsageError
from trtllm.runtime import generation
from trtllm.runtime.outputs import CompletionOutput, RequestOutput
from trtllm.runtime.sampling import SamplingParams
from trtllm.runtime.session import open_session
from trtllm.runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """A loaded engine.

    Args:
        model: an engine directory.
        threads: compute threads; all cores by default.
        verify: recompute every file's hash before loading (about a second per gigabyte).

    Use it as a context manager, or call `shutdown` when done.
    """

    def __init__(self, model: str | Path | Engine, *, threads: int | None = None, verify: bool = True) -> None:
        self.engine = model if isinstance(model, Engine) else open_engine(model, verify=verify)
        if self.engine.config["model"]["kind"] != "decoder":
            raise UsageError(f"{self.engine.path} is an encoder, which does not generate", "use trtllm.Embedder on it")
        self.tokenizer = Tokenizer.from_directory(self.engine.path)
        self._session: Any = open_session(self.engine, threads=threads)
        self._request_count = 0

    def generate(
        self,
        inputs: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Generates for one prompt (one RequestOutput) or a list of prompts (a list, in their order).

        A prompt is a string, token ids, or a dict with "prompt" or "prompt_token_ids".
        Raises UsageError for a prompt that is empty or longer than the engine takes.
        """
        single = _is_single(inputs)
        prompts: list[Any] = [inputs] if single else list(inputs)
        params = _params_for(prompts, sampling_params)
        pairs = [self._sequence(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
        generation.generate(self._live_session(), [sequence for _, sequence in pairs], self._stops)
        outputs = [self._output(text, sequence) for text, sequence in pairs]
        return outputs[0] if single else outputs

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> RequestOutput | list[RequestOutput]:
        """Answers one conversation (a list of {"role", "content"}) or a list of conversations."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        prompts: list[Prompt] = [
            self.tokenizer.encode(
                self.tokenizer.apply_chat_template(
                    list(conversation), tools=tools, add_generation_prompt=add_generation_prompt
                ),
                add_special_tokens=False,
            )
            for conversation in conversations
        ]
        outputs = self.generate(prompts, sampling_params)
        assert isinstance(outputs, list)
        return outputs[0] if single else outputs

    def shutdown(self) -> None:
        """Releases the engine; the object cannot generate afterwards."""
        self._session = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _live_session(self) -> Any:
        if self._session is None:
            raise UsageError("this LLM has been shut down", "make a new one")
        return self._session

    def _sequence(self, prompt: Prompt, params: SamplingParams) -> tuple[str | None, generation.Sequence]:
        text, ids = self._prompt_tokens(prompt, params)
        limits = self._live_session().limits
        if not ids:
            raise UsageError("a prompt is empty", "give at least one token")
        if len(ids) > min(limits.max_input_len, limits.max_seq_len - 1):
            raise UsageError(
                f"a prompt has {len(ids)} tokens, the engine takes {min(limits.max_input_len, limits.max_seq_len - 1)}",
                "shorten it, or rebuild with a larger --max-seq-len",
            )
        outside = next((token for token in ids if not 0 <= token < limits.vocab_size), None)
        if outside is not None:
            raise UsageError(
                f"token id {outside} is outside the vocabulary of {limits.vocab_size}", "use this engine's tokenizer"
            )
        end_ids = set(params.stop_token_ids or ())
        if not params.ignore_eos:
            end_ids |= {params.end_id} if params.end_id is not None else set(self.tokenizer.eos_token_ids)
        return text, generation.Sequence(ids, params, frozenset(end_ids))

    def _prompt_tokens(self, prompt: Prompt, params: SamplingParams) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return None, list(prompt["prompt_token_ids"])
            if "prompt" not in prompt:
                raise UsageError("a prompt dict has neither 'prompt' nor 'prompt_token_ids'", "give one of them")
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt, add_special_tokens=params.add_special_tokens)
        return None, [int(token) for token in prompt]

    def _stops(self, sequence: generation.Sequence) -> bool:
        strings = sequence.params.stop_strings
        if not strings:
            return False
        text = self.tokenizer.decode(sequence.tokens, skip_special_tokens=sequence.params.skip_special_tokens)
        found = [string for string in strings if string in text]
        if found:
            sequence.stop_reason = min(found, key=text.index)
        return bool(found)

    def _output(self, prompt: str | None, sequence: generation.Sequence) -> RequestOutput:
        self._request_count += 1
        params = sequence.params
        text = ""
        if params.detokenize:
            text = self.tokenizer.decode(sequence.tokens, skip_special_tokens=params.skip_special_tokens)
            if isinstance(sequence.stop_reason, str):
                end = text.index(sequence.stop_reason)
                text = text[: end + (len(sequence.stop_reason) if params.include_stop_str_in_output else 0)]
        completion = CompletionOutput(
            0, text, sequence.tokens, finish_reason=sequence.finish_reason, stop_reason=sequence.stop_reason
        )
        return RequestOutput(self._request_count, prompt, sequence.prompt, [completion], finished=True)


def _is_single(inputs: Any) -> bool:
    if isinstance(inputs, str | Mapping):
        return True
    return bool(len(inputs)) and not isinstance(inputs[0], str | Mapping | Sequence)


def _params_for(prompts: Sequence[Any], given: Any) -> list[SamplingParams]:
    if given is None:
        given = SamplingParams()
    if isinstance(given, SamplingParams):
        return [given] * len(prompts)
    if len(given) != len(prompts):
        raise UsageError(f"{len(prompts)} prompts but {len(given)} sampling params", "give one, or one for each prompt")
    return list(given)
