"""What a command says: results on stdout, everything else on stderr, errors in two lines or as one JSON object."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from trtllm.errors import UsageError, nearest

LEVELS = ("debug", "info", "warning", "error")
A_BUG = "this is a bug; rerun with --log-level debug for the traceback"


def checked_level(name: str, *, quiet: bool) -> str:
    """The level that --log-level and --quiet mean together. Raises UsageError for one that is not known."""
    if name not in LEVELS:
        raise UsageError(f"unknown log level {nearest(name, LEVELS)}", f"levels: {', '.join(LEVELS)}")
    return "error" if quiet else name


@dataclass
class Console:
    """The two streams of one run of a command."""

    name: str
    """Of the command: errors begin with it."""
    json_output: bool = False
    level: str = "info"

    def say(self, text: str) -> None:
        """A line of the result; with --json it goes to stderr, where it disturbs nobody."""
        print(text, file=sys.stderr if self.json_output else sys.stdout, flush=True)

    def tell(self, text: str, level: str = "info") -> None:
        """A line beside the result, when `level` is not below the console's."""
        if LEVELS.index(level) >= LEVELS.index(self.level):
            print(text, file=sys.stderr, flush=True)

    def result(self, data: Mapping[str, Any]) -> None:
        """The machine-readable result, the only thing on stdout."""
        if self.json_output:
            json.dump(data, sys.stdout, indent=1)
            print(flush=True)

    def error(self, what: str, hint: str, exit_code: int, cause: BaseException | None = None) -> int:
        """Reports an error in two lines, and as JSON when results are; returns `exit_code`."""
        what, hint = _one_line(what), _one_line(hint)
        if self.level == "debug" and cause is not None:
            traceback.print_exception(cause, file=sys.stderr)
        if self.json_output:
            json.dump({"error": what, "hint": hint, "exit_code": exit_code}, sys.stdout)
            print(flush=True)
        print(f"{self.name}: {what}" + (f"\n  {hint}" if hint else ""), file=sys.stderr, flush=True)
        return exit_code

    @property
    def stderr(self) -> TextIO:
        return sys.stderr


def _one_line(text: str) -> str:
    return " ".join(text.split())
