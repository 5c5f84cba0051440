"""Draws the progress of a command: a bar on a terminal, plain lines elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol

from trtllm.memory import peak_memory
from trtllm.progress import Progress
from trtllm.sizes import format_size
from trtllm.tools.console import Console

_STEP_LIMIT = 10_000
"""Totals up to this are counts; larger ones are bytes."""


class Display(Progress, Protocol):
    """A Progress with an end."""

    def __enter__(self) -> Display: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def display_for(console: Console, *, monitor_memory: bool = False) -> Display:
    """What suits the console: a bar when stderr is a terminal and stages are wanted."""
    if console.level in ("debug", "info") and sys.stderr.isatty() and not monitor_memory:
        return BarDisplay(console)
    return LineDisplay(console, monitor_memory=monitor_memory)


class LineDisplay:
    """A line for each stage, when it begins, and for each note."""

    def __init__(self, console: Console, *, monitor_memory: bool = False) -> None:
        self._console = console
        self._monitor_memory = monitor_memory
        self._stage: str | None = None

    def stage(self, name: str, total: int | None = None) -> None:
        self._report_memory()
        self._stage = name
        size = f" ({format_size(total)})" if total is not None and total > _STEP_LIMIT else ""
        self._console.tell(f"{name}{size}")

    def advance(self, amount: int) -> None:
        pass

    def note(self, text: str) -> None:
        self._console.tell(f"note: {text}")

    def _report_memory(self) -> None:
        peak = peak_memory()
        if self._monitor_memory and self._stage is not None and peak is not None:
            self._console.tell(f"peak memory after {self._stage}: {format_size(peak)}", "error")

    def __enter__(self) -> LineDisplay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._report_memory()


class BarDisplay:
    """One rich progress bar, renamed at each stage; finished stages stay as lines with their seconds."""

    def __init__(self, console: Console) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._rich = RichConsole(file=console.stderr, highlight=False)
        self._bar: Any = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self._rich,
            transient=True,
        )
        self._task: Any = None
        self._name = ""
        self._begun = 0.0

    def stage(self, name: str, total: int | None = None) -> None:
        self._finish()
        self._task, self._name, self._begun = self._bar.add_task(name, total=total), name, time.monotonic()

    def advance(self, amount: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, amount)

    def note(self, text: str) -> None:
        self._rich.print(f"note: {text}", markup=False)

    def _finish(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._rich.print(f"{self._name}: {time.monotonic() - self._begun:.1f} s", markup=False)
        self._task = None

    def __enter__(self) -> BarDisplay:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._bar.stop()
