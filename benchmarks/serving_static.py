"""Peers without in-flight batching: groups of requests, padded to one length and run until the longest row is done."""

import json
from pathlib import Path

import numpy as np
from serving_results import Completion
from serving_workload import ServingRequest


def split_groups(requests: list[ServingRequest], size: int) -> list[list[ServingRequest]]:
    """Cut the requests into groups of at most `size`, in their order."""
    return [requests[first : first + size] for first in range(0, len(requests), size)]


def pad_left(group: list[ServingRequest], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts padded on the left, and their mask, both int64 [rows, longest prompt]."""
    width = max(len(request.prompt) for request in group)
    tokens = np.full((len(group), width), pad, np.int64)
    mask = np.zeros((len(group), width), np.int64)
    for row, request in enumerate(group):
        tokens[row, width - len(request.prompt) :] = request.prompt
        mask[row, width - len(request.prompt) :] = 1
    return tokens, mask


class TransformersStatic:
    """transformers on PyTorch, fp32, with its dynamic cache."""

    def __init__(self, path: Path, slots: int, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.slots = torch, slots
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def serve(self, requests: list[ServingRequest]) -> list[Completion]:
        """Serve the groups one after the other; tokens are not timed."""
        return [completion for group in split_groups(requests, self.slots) for completion in self._run(group)]

    def _run(self, group: list[ServingRequest]) -> list[Completion]:
        tokens, mask = (self.torch.from_numpy(array) for array in pad_left(group, 0))
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        cache, columns = None, []
        for _ in range(max(request.new_tokens for request in group)):
            output = self.model(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            cache, tokens = output.past_key_values, output.logits[:, -1].argmax(dim=-1, keepdim=True)
            mask = self.torch.cat([mask, self.torch.ones_like(tokens)], dim=1)
            positions = positions[:, -1:] + 1
            columns.append(tokens[:, 0].tolist())
        rows = zip(*columns, strict=True)
        return [Completion(list(row[: request.new_tokens])) for row, request in zip(rows, group, strict=True)]

    def close(self) -> None:
        """Free nothing: the process ends right after."""


class GenaiStatic:
    """onnxruntime-genai's generator; it takes its mask from the padding token."""

    def __init__(self, path: Path, slots: int, threads: int):
        import onnxruntime_genai

        self.library, self.slots = onnxruntime_genai, slots
        self.pad = json.loads((path / "genai_config.json").read_text())["model"]["pad_token_id"]
        config = onnxruntime_genai.Config(str(path))
        options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = onnxruntime_genai.Model(config)

    def serve(self, requests: list[ServingRequest]) -> list[Completion]:
        """Serve the groups one after the other; tokens are not timed."""
        return [completion for group in split_groups(requests, self.slots) for completion in self._run(group)]

    def _run(self, group: list[ServingRequest]) -> list[Completion]:
        tokens, _ = pad_left(group, self.pad)
        new_tokens = max(request.new_tokens for request in group)
        parameters = self.library.GeneratorParams(self.model)
        length = tokens.shape[1] + new_tokens
        # min_length keeps rows from ending early.
        parameters.set_search_options(do_sample=False, batch_size=len(group), max_length=length, min_length=length)
        generator = self.library.Generator(self.model, parameters)
        generator.append_tokens(tokens.astype(np.int32))
        columns = []
        for _ in range(new_tokens):
            generator.generate_next_token()
            columns.append(generator.get_next_tokens().tolist())
        rows = zip(*columns, strict=True)
        return [Completion(list(row[: request.new_tokens])) for row, request in zip(rows, group, strict=True)]

    def close(self) -> None:
        """Free nothing: the process ends right after."""
