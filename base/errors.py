"""The errors a user can meet: each says what is wrong and where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class TrtllmError(Exception):
    """What went wrong (`what`, with its place) and what to do next (`hint`).

    `exit_code` is the exit status of a command that ends with this error.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(f"{what}\n  {hint}" if hint else what)
        self.what = what
        self.hint = hint


class UsageError(TrtllmError, ValueError):
    """The request itself makes no sense: an unknown option, a value out of range, an occupied output."""

    exit_code = 2


class UnsupportedModelError(TrtllmError):
    """The model is readable, but no builder or target can express it."""

    exit_code = 3


class BadInputError(TrtllmError):
    """The files of a model or engine are damaged, incomplete or contradict each other."""

    exit_code = 4


class TargetError(TrtllmError):
    """The target's library is missing, of the wrong version, or refused the build."""

    exit_code = 5


class ResourceError(TrtllmError):
    """Memory or disk does not suffice."""

    exit_code = 6


class GraphError(TrtllmError):
    """A graph broke the rules of the IR: a defect of a pass or a builder, never the user's."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """`name` with the closest of `known` as a suggestion: "'max_batchsize' (did you mean 'max_batch_size'?)"."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"'{name}' (did you mean '{close[0]}'?)" if close else f"'{name}'"


def listed(names: Iterable[str], limit: int = 4) -> str:
    """The first of `names`, and how many more there are: "a, b, c, d and 86 more"."""
    known = list(names)
    rest = len(known) - limit
    return ", ".join(known[:limit]) + (f" and {rest} more" if rest > 0 else "")
