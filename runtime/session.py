"""What the runtime asks of an engine kind: a cache of slots, and steps over them. Sessions know nothing of requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trtllm.compiler.engine import Engine
from trtllm.errors import TargetError


@dataclass(frozen=True)
class SessionLimits:
    """What a session was built for."""

    max_batch_size: int
    """Cache slots."""
    max_seq_len: int
    """Cache rows of a slot, in tokens."""
    max_input_len: int
    vocab_size: int
    gathers_context_logits: bool
    """Whether logits of every new token come back, not only of the last."""


class Session(Protocol):
    """An engine that is loaded and has its cache."""

    @property
    def limits(self) -> SessionLimits: ...

    def step(self, first_slot: int, tokens: np.ndarray, past_lengths: np.ndarray) -> np.ndarray:
        """Runs tokens int64 [rows, S] on slots first_slot .. first_slot + rows - 1.

        past_lengths int64 [rows] are the rows each slot's cache holds already. With more than one row S must be 1.
        Returns float32 logits [rows, S or 1, V], valid until the next step.
        """
        ...


class EncoderSession(Protocol):
    """An encoder engine that is loaded."""

    def encode(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Runs right-padded tokens int64 [rows, S], of which lengths int64 [rows] are valid.

        Returns float32 embeddings [rows, H], or for an engine without pooling the states [rows, S, H].
        """
        ...


def limits_of(config: Mapping[str, Any]) -> SessionLimits:
    """The limits in an engine's config.json."""
    build = config["build_config"]
    return SessionLimits(
        max_batch_size=build["max_batch_size"],
        max_seq_len=build["max_seq_len"],
        max_input_len=build["max_input_len"],
        vocab_size=config["model"]["vocab_size"],
        gathers_context_logits=build["gather_context_logits"],
    )


def open_session(engine: Engine, *, threads: int | None = None) -> Any:
    """The session of an engine's kind and target. Raises TargetError when this machine cannot run it."""
    if engine.target != "onnxruntime":
        raise TargetError(
            f"{engine.path} is an engine for target '{engine.target}', which this machine cannot run",
            "build it with --target onnxruntime to run on a CPU",
        )
    if engine.config["model"]["kind"] == "encoder":
        from trtllm.runtime.sessions.onnxruntime_encoder import OnnxRuntimeEncoder

        return OnnxRuntimeEncoder(engine, threads=threads)
    from trtllm.runtime.sessions.onnxruntime_session import OnnxRuntimeSession

    return OnnxRuntimeSession(engine, threads=threads)
