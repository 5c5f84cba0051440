"""llama.cpp's continuous batching, as its server does it, on the low-level bindings of llama-cpp-python.

Each step is one `llama_decode`: a token of every generating slot, then prompt tokens of the slots that are not through
their prompts, as many as the batch holds. A request takes the free slot whose cache resembles its prompt most. Beyond
the server, it also takes a longer prefix from any other slot, free or busy, by copying it: prefixes are shared as soon
as one slot has computed them.
"""

import ctypes
import dataclasses
import time
from collections import deque
from pathlib import Path

import numpy as np
from serving_results import Completion
from serving_workload import ServingRequest


@dataclasses.dataclass(frozen=True)
class LlamaOptions:
    """How llama.cpp is run; the fields that have a default take llama-server's."""

    slots: int
    flash_attention: bool
    unified_cache: bool
    micro_batch: int = 512
    batch: int = 2048


@dataclasses.dataclass(eq=False)
class Slot:
    """One sequence of llama.cpp's cache: the tokens that lie in it, and the request that it serves, if any."""

    index: int
    cached: list[int] = dataclasses.field(default_factory=list)
    request: ServingRequest | None = None
    completion: Completion | None = None
    started: bool = False  # its prompt has begun, and the prefix it could take over has been taken

    @property
    def is_generating(self) -> bool:
        return self.completion is not None and bool(self.completion.tokens)


def common_prefix(left: list[int], right: list[int]) -> int:
    """Return how many tokens both lists begin with."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))


class LlamaParallel:
    """A loaded GGUF and `slots` sequences of at most `max_length` tokens."""

    def __init__(self, path: Path, options: LlamaOptions, max_length: int, threads: int):
        import llama_cpp

        self.library, self.options = llama_cpp, options
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max, parameters.n_ctx = options.slots, options.slots * max_length
        parameters.n_batch, parameters.n_ubatch = options.batch, options.micro_batch
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.kv_unified, parameters.flash_attn_type = options.unified_cache, int(options.flash_attention)
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context for {path}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.buffer = llama_cpp.llama_batch_init(options.batch, 0, 1)
        self.slots = [Slot(index) for index in range(options.slots)]

    def serve(self, requests: list[ServingRequest]) -> list[Completion]:
        """Serve every request from its arrival on, greedily, and return the completions in the same order."""
        completions = [Completion() for _ in requests]
        waiting = deque(zip(requests, completions, strict=True))
        start = time.perf_counter()
        while waiting or any(slot.request for slot in self.slots):
            self._admit(waiting, time.perf_counter() - start)
            if not any(slot.request for slot in self.slots):
                time.sleep(max(0.0, waiting[0][0].arrival - (time.perf_counter() - start)))
                continue
            self._step(start)
        return completions

    def close(self) -> None:
        """Free nothing: the process ends right after."""

    def _admit(self, waiting: deque[tuple[ServingRequest, Completion]], now: float) -> None:
        """Give free slots to the requests that have arrived."""
        free = [slot for slot in self.slots if slot.request is None]
        while free and waiting and waiting[0][0].arrival <= now:
            request, completion = waiting.popleft()
            slot = max(free, key=lambda slot: common_prefix(slot.cached, request.prompt))
            free.remove(slot)
            slot.request, slot.completion, slot.started = request, completion, False

    def _step(self, start: float) -> None:
        """Decode one batch and hand out the tokens that it gave."""
        self.buffer.n_tokens = 0
        generating = [slot for slot in self.slots if slot.is_generating]
        outputs = [(self._append(slot, slot.completion.tokens[-1:], wants_logits=True), slot) for slot in generating]
        for slot in self.slots:
            room = self.options.batch - self.buffer.n_tokens
            if slot.request is None or slot.is_generating or not room:
                continue
            if not slot.started:
                self._take_prefix(slot)
            chunk = slot.request.prompt[len(slot.cached) :][:room]
            is_last = len(slot.cached) + len(chunk) == len(slot.request.prompt)
            index = self._append(slot, chunk, wants_logits=is_last)
            if is_last:
                outputs.append((index, slot))
        if self.library.llama_decode(self.context, self.buffer):
            raise RuntimeError("llama_decode failed")
        self._accept(outputs, start)

    def _append(self, slot: Slot, tokens: list[int], *, wants_logits: bool) -> int:
        """Add a slot's next tokens to the batch; return the batch index of the last of them."""
        buffer = self.buffer
        for token in tokens:
            index = buffer.n_tokens
            buffer.token[index], buffer.pos[index] = token, len(slot.cached)
            buffer.n_seq_id[index], buffer.seq_id[index][0] = 1, slot.index
            buffer.logits[index] = 0
            buffer.n_tokens = index + 1
            slot.cached.append(token)
        buffer.logits[index] = wants_logits
        return index

    def _accept(self, outputs: list[tuple[int, Slot]], start: float) -> None:
        """Pick the token of every slot that has logits, and free the slots that are done; their cache stays."""
        for index, slot in outputs:
            logits = self.library.llama_get_logits_ith(self.context, index)
            slot.completion.tokens.append(int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax()))
        now = time.perf_counter() - start
        for _, slot in outputs:
            slot.completion.seconds.append(now)
            if len(slot.completion.tokens) == slot.request.new_tokens:
                slot.request = slot.completion = None

    def _take_prefix(self, slot: Slot) -> None:
        """Keep what the slot's cache shares with its prompt, or copy what another slot's shares when that is longer.

        Tokens added to the batch under construction are not computed yet and cannot be copied.
        """
        prompt = slot.request.prompt[:-1]  # at least one token must run to give logits
        slot.started = True
        pending = self._pending()
        lengths = {
            other.index: common_prefix(other.cached[: len(other.cached) - pending[other.index]], prompt)
            for other in self.slots
        }
        best = max(self.slots, key=lambda other: (lengths[other.index], other is slot))
        if best is not slot:
            self.library.llama_memory_seq_rm(self.memory, slot.index, -1, -1)
            # Separate buffers can only be copied whole.
            end = lengths[best.index] if self.options.unified_cache else -1
            self.library.llama_memory_seq_cp(self.memory, best.index, slot.index, -1, end)
        kept = lengths[best.index]
        self.library.llama_memory_seq_rm(self.memory, slot.index, kept, -1)
        slot.cached = best.cached[:kept]

    def _pending(self) -> list[int]:
        """Return how many tokens of each slot are in the batch under construction."""
        counts = [0] * len(self.slots)
        for index in range(self.buffer.n_tokens):
            counts[self.buffer.seq_id[index][0]] += 1
        return counts
