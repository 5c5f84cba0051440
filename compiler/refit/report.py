"""What a refit would do, and why it cannot be: everything at once, before a byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trtllm.errors import BadInputError

_LISTED = 5


@dataclass(frozen=True)
class RefitReport:
    """The pre-flight of a refit. `problems` make it impossible; `notes` are what the user should know."""

    engine: str
    source: str
    kind: str
    """"checkpoint", "tensors", "adapter" or "revert"."""
    architecture: str
    source_architecture: str | None
    target: str
    target_version: str
    dtypes: tuple[str, ...]
    """Element types of the tensors that are read."""
    quantization: str | None
    """Of the engine."""
    vocab_size: int
    weights: int
    changed_weights: tuple[str, ...]
    """Weights that are made anew; the others keep the engine's bytes."""
    changed_bytes: int
    missing: tuple[str, ...] = ()
    """Tensors that the engine's recipes read and that nobody gave."""
    unused: tuple[str, ...] = ()
    """Tensors that were given and that no recipe reads."""
    misshapen: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "changed_weights": len(self.changed_weights)}

    def check(self) -> None:
        """Raises BadInputError that says every problem."""
        if self.problems:
            hint = self.hints[0] if self.hints else "give a checkpoint of the model that the engine was built from"
            raise BadInputError(f"{self.source} does not fit {self.engine}: {'; '.join(self.problems)}", hint)

    def lines(self) -> list[str]:
        """The report for people."""
        changed = f"{len(self.changed_weights)} of {self.weights} weights are made anew"
        lines = [
            f"engine        {self.engine} ({self.architecture}, {self.target} {self.target_version})",
            f"new weights   {self.source} ({self.kind})",
            f"tensors       {', '.join(self.dtypes) or 'none'}; engine quantization {self.quantization or 'none'}",
            f"weights       {changed}, {self.changed_bytes / 1e6:.0f} MB",
            f"vocabulary    {self.vocab_size}",
        ]
        for label, names in (("missing", self.missing), ("unused", self.unused), ("shapes", self.misshapen)):
            if names:
                lines.append(f"{label:<13} {listed(names)}")
        lines += [f"note          {note}" for note in self.notes]
        lines += [f"PROBLEM       {problem}" for problem in self.problems]
        return lines


def listed(names: Sequence[str], limit: int = _LISTED) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
