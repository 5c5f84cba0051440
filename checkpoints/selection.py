"""Chooses tensors by name: the matrices of the layers, all of them, or what patterns say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from trtllm.errors import UsageError, nearest

_LAYER = re.compile(r"(^|\.)(layers?|h)\.\d+\.")


@dataclass(frozen=True)
class Selection:
    """Which tensors are meant. Patterns are globs over whole names, where `*` also spans dots.

    Without `include` and `everything` it is the matrices of the layers: what a model is large by, without embeddings,
    head, norms and biases.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    everything: bool = False

    def of(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """The chosen names, in the order of `shapes`.

        Raises UsageError for a pattern that matches nothing, and when nothing is left.
        """
        self._check_patterns(shapes)
        chosen = tuple(
            name for name, shape in shapes.items() if self._takes(name, shape) and not _matches(name, self.exclude)
        )
        if not chosen:
            raise UsageError("no tensor is selected", "widen --include, narrow --exclude, or use --prune-all")
        return chosen

    def _takes(self, name: str, shape: tuple[int, ...]) -> bool:
        if not prod(shape):
            return False
        if self.include:
            return _matches(name, self.include)
        return self.everything or (len(shape) > 1 and _LAYER.search(name) is not None)

    def _check_patterns(self, names: Iterable[str]) -> None:
        idle = [
            pattern
            for pattern in (*self.include, *self.exclude)
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
        if idle:
            listed = ", ".join(nearest(pattern, names) for pattern in idle)
            raise UsageError(f"no tensor matches {listed}", "patterns are globs over whole names: '*.mlp.*'")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
