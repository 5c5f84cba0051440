"""The peers behind one small interface; each foreign library is imported by its own class only."""

import ctypes
import json
from pathlib import Path

import numpy as np


class LlamaCpp:
    """llama.cpp through the low-level bindings of llama-cpp-python, one sequence for each row of the batch."""

    def __init__(self, path: Path, batch: int, max_length: int, threads: int):
        import llama_cpp

        self.library = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_parameters)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = batch
        parameters.n_ctx = batch * (-(-max_length // 256) * 256)
        parameters.n_batch = batch * max_length
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context for {path}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.buffer = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        self.library.llama_memory_clear(self.library.llama_get_memory(self.context), True)
        self.position = 0
        return self._run(prompts)

    def step(self) -> list[int]:
        return self._run([[token] for token in self.tokens])

    def _run(self, rows: list[list[int]]) -> list[int]:
        """Decode the rows, which all have one length, and pick the next token of each."""
        length, index, buffer = len(rows[0]), 0, self.buffer
        for sequence, row in enumerate(rows):
            for offset, token in enumerate(row):
                buffer.token[index], buffer.pos[index] = token, self.position + offset
                buffer.n_seq_id[index], buffer.seq_id[index][0] = 1, sequence
                buffer.logits[index] = offset == length - 1
                index += 1
        buffer.n_tokens = index
        if self.library.llama_decode(self.context, buffer):
            raise RuntimeError("llama_decode failed")
        self.position += length
        logits = self.library.llama_get_logits(self.context)
        self.tokens = np.ctypeslib.as_array(logits, shape=(len(rows), self.vocabulary)).argmax(axis=1).tolist()
        return self.tokens


class Genai:
    """onnxruntime-genai's own generator loop."""

    def __init__(self, path: Path, batch: int, max_length: int, threads: int):
        import onnxruntime_genai

        self.library, self.max_length, self.batch = onnxruntime_genai, max_length, batch
        config = onnxruntime_genai.Config(str(path))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        parameters = self.library.GeneratorParams(self.model)
        # min_length keeps a row from ending early, the others would then run in a smaller batch.
        parameters.set_search_options(
            do_sample=False, batch_size=self.batch, max_length=self.max_length, min_length=self.max_length
        )
        self.generator = self.library.Generator(self.model, parameters)
        self.generator.append_tokens(np.array(prompts, dtype=np.int32))
        return self.step()

    def step(self) -> list[int]:
        self.generator.generate_next_token()
        return self.generator.get_next_tokens().tolist()


class Transformers:
    """transformers on PyTorch, fp32, with its dynamic cache and no compilation."""

    def __init__(self, path: Path, batch: int, max_length: int, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        self.cache = None
        return self._run(self.torch.tensor(prompts))

    def step(self) -> list[int]:
        return self._run(self.tokens)

    def _run(self, tokens) -> list[int]:
        output = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        self.tokens = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        return self.tokens[:, 0].tolist()
