"""Runs an onnxruntime engine once over one sequence and gives any of its values, for comparing engines.

It takes the graph as bytes, so that whoever looks inside may have added outputs to it; weights are the engine's own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from trtllm.compiler.engine import Engine
from trtllm.compiler.stripping import refuse_stripped
from trtllm.runtime.sessions.onnxruntime_library import NUMPY_TYPES, bind, register_operators


class TappedSession:
    """An engine's graph, packed or padded, with an empty cache at each run."""

    def __init__(self, engine: Engine, graph: bytes, *, threads: int | None = None) -> None:
        """`graph` is the engine's model, with outputs added. Raises UsageError for a stripped engine."""
        import onnxruntime

        refuse_stripped(engine)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or os.cpu_count() or 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(engine.path))
        register_operators(options)
        self._config = engine.config
        self._session: Any = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(self, tokens: np.ndarray, outputs: Sequence[str]) -> list[np.ndarray]:
        """The values named in `outputs` for tokens int64 [T], in one step from an empty cache."""
        feeds = self._feeds(tokens)
        binding = self._session.io_binding()
        for name, array in feeds.items():
            bind(binding.bind_input, name, array)
            if name.startswith("past_") and name != "past_lengths":
                bind(binding.bind_output, name.replace("past_", "present_"), array)
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        results = binding.copy_outputs_to_cpu()
        return [np.asarray(result) for result in results[len(results) - len(outputs) :]]

    def _feeds(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        count, cache = len(tokens), self._config["cache"]
        packed = cache["kind"] == "paged"
        size = cache["tokens_per_block"] if packed else max(count, self._config["build_config"]["max_seq_len"])
        blocks = -(-count // size)
        known = {
            "input_ids": tokens[None], "positions": np.arange(count)[None], "row_starts": np.array([0, count]),
            "past_lengths": np.zeros(1), "lengths": np.array([count]), "logits_indices": np.arange(count),
        }  # fmt: skip
        feeds = {}
        for item in self._config["io"]["inputs"]:
            name, dtype = item["name"], NUMPY_TYPES[item["dtype"]]
            if name in known:
                feeds[name] = np.ascontiguousarray(known[name], dtype)
            elif name.startswith("block_table."):
                feeds[name] = np.arange(blocks, dtype=np.int32)[None]
            else:
                _, heads, _, width = item["shape"]
                feeds[name] = np.zeros((blocks, heads, size, width), dtype)
        return feeds
