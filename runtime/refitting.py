"""Changes the weights of a running LLM: a refitted engine is loaded beside the old one and then takes its place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trtllm.compiler.engine import Engine
from trtllm.errors import UsageError
from trtllm.progress import Progress

InFlight = Literal["finish", "recompute"]


@dataclass(frozen=True)
class LiveRefit:
    """What `LLM.refit` was asked for."""

    model: Any
    in_flight: InFlight = "finish"
    base: Any = None
    strength: float = 1.0
    partial: bool = False
    revert: bool = False
    recalibrate: bool = False
    verify: bool = False
    output_dir: str | Path | None = None
    threads: int = 0


@dataclass(frozen=True, eq=False)
class RefittedEngine:
    """An engine with other weights, and the folder that goes when it is no longer needed."""

    engine: Engine
    holder: tempfile.TemporaryDirectory[str] | None

    def remove(self) -> None:
        """Deletes a temporary engine; files that are still mapped live on until they are let go."""
        if self.holder is not None:
            self.holder.cleanup()


def make_refitted(engine: Engine, wanted: LiveRefit, progress: Progress) -> RefittedEngine:
    """Writes the engine with other weights, to `output_dir` or a temporary folder.

    Raises BadInputError for weights that do not fit, before anything of the running engine is touched.
    """
    from trtllm.compiler.refit.refit import RefitOptions, refit_engine

    if wanted.in_flight not in ("finish", "recompute"):
        raise UsageError(f"in_flight is {wanted.in_flight!r}", 'give "finish" or "recompute"')
    options = RefitOptions(
        base=wanted.base,
        strength=wanted.strength,
        partial=wanted.partial or isinstance(wanted.model, Mapping),
        revert=wanted.revert,
        recalibrate=wanted.recalibrate,
        verify=wanted.verify,
        threads=wanted.threads,
        keeps_tokenizer=True,
    )
    if wanted.output_dir is not None:
        made = refit_engine(engine, wanted.model, wanted.output_dir, options=options, progress=progress)
        return RefittedEngine(made.engine, None)
    holder = tempfile.TemporaryDirectory(prefix="trtllm-refit-")
    try:
        made = refit_engine(engine, wanted.model, Path(holder.name) / "engine", options=options, progress=progress)
    except BaseException:
        holder.cleanup()
        raise
    return RefittedEngine(made.engine, holder)


def exchange_weights(executor: Any, session: Any, engine: Engine, in_flight: InFlight) -> None:
    """Loads the engine beside the session's and exchanges them between two steps; on failure nothing has changed."""
    take: Callable[[], None] = session.loaded(engine)
    executor.exchange(take, recompute=in_flight == "recompute")
