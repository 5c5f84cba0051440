"""Finds stop strings in text that comes in pieces, and holds back what could be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopHit:
    """A stop string was found: `text` is what may still be shown, up to the stop string or with it."""

    text: str
    stop: str


class StopStringFinder:
    """Looks for the stop string that is complete first; of those complete at one place, the longest.

    What it finds does not depend on how the text is cut into pieces. The cost of a piece grows with its own length
    and the longest stop string, not with the text before.
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stops = [stop for stop in dict.fromkeys(stops) if stop]
        self._include = include_in_output
        self._held = ""

    def feed(self, piece: str) -> str | StopHit:
        """The text that can be shown now, or the hit; after a hit the finder is done with."""
        text = self._held + piece
        hit = self._first_hit(text)
        if hit is not None:
            start, stop = hit
            return StopHit(text[: start + (len(stop) if self._include else 0)], stop)
        kept = self._unsure_length(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text

    def _first_hit(self, text: str) -> tuple[int, str] | None:
        found = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        return min(ends)[1:] if ends else None

    def _unsure_length(self, text: str) -> int:
        """The length of the longest end of `text` that begins a stop string."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
