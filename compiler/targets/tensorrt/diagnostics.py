"""What a TensorRT builder says while it works: its errors, kept for our own, and its progress."""

from __future__ import annotations

import re
import threading
from typing import Any

from trtllm.progress import Progress

STAGE = "building the plan"
_SOURCE = re.compile(r"^(?:\[?[\w./]+\.(?:cpp|h)[:\w\d\s()~]*\]?\s*)+")


class Log:
    """The errors and warnings of one build, in order."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def first_error(self) -> str:
        """The first error without its place in the library's source; empty when there was none."""
        return readable(self.errors[0]) if self.errors else ""


def readable(message: str) -> str:
    """A library message without its source files and with one space between words."""
    text = " ".join(message.split())
    text = re.sub(r"^(IBuilder::\w+|ITensor::\w+|INetworkDefinition::\w+|I\w+::\w+): ", "", text)
    text = re.sub(r"^Error Code \d+: ", "", text)
    text = re.sub(r"\.?\s*In \w+ at [\w./]+:\d+", "", text)
    return _SOURCE.sub("", text).strip() or text


def logger(trt: Any, log: Log) -> Any:
    """A library logger that writes to `log`."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.min_severity = trt.ILogger.WARNING

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                log.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                log.warnings.append(message)

    return Logger()


def monitor(trt: Any, progress: Progress) -> Any:
    """A library progress monitor that reports the steps of the outermost phases."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._remaining: dict[str, int] = {}
            """Steps to come of each outermost phase: the library does not report its last ones."""
            self._lock = threading.Lock()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                with self._lock:
                    self._remaining[phase_name] = num_steps
                    progress.stage(STAGE, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                with self._lock:
                    if self._remaining.get(phase_name, 0) > 0:
                        self._remaining[phase_name] -= 1
                        progress.advance(1)
            except KeyboardInterrupt:
                return False
            return True

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                progress.advance(self._remaining.pop(phase_name, 0))

    return Monitor()
