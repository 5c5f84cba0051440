"""One line on standard error that counts what is done."""

from __future__ import annotations

import sys
import time

_SECONDS_BETWEEN = 0.2


class ProgressLine:
    """A Progress that shows "generated 12/40"; nothing when standard error is no terminal."""

    def __init__(self, verb: str, total: int) -> None:
        self._verb = verb
        self._total = total
        self._done = 0
        self._shown_at = 0.0
        self._is_terminal = sys.stderr.isatty()

    def stage(self, name: str, total: int | None = None) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def advance(self, amount: int) -> None:
        self._done += amount
        is_last = self._done >= self._total
        if self._is_terminal and (is_last or time.monotonic() - self._shown_at >= _SECONDS_BETWEEN):
            self._shown_at = time.monotonic()
            print(
                f"\r{self._verb} {self._done}/{self._total}", end="\n" if is_last else "", file=sys.stderr, flush=True
            )
