"""Runs an onnxruntime engine that has no cache: tokens in, embeddings or states out."""

from __future__ import annotations

import numpy as np

from trtllm.compiler.engine import Engine
from trtllm.runtime.sessions.onnxruntime_library import load


class OnnxRuntimeEncoder:
    """An encoder engine."""

    def __init__(self, engine: Engine, *, threads: int | None = None) -> None:
        self._session = load(engine, threads)
        self._output: str = engine.config["io"]["outputs"][0]["name"]

    def encode(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """See `trtllm.runtime.session.EncoderSession.encode`."""
        result: np.ndarray = self._session.run([self._output], {"input_ids": tokens, "lengths": lengths})[0]
        return result
