"""What trtllm-diff found, as lines for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trtllm.compiler.inspection.difference import Difference, TensorDifference

_WIDTH = 60
"""Characters of a value that are shown."""


def lines(found: Difference, limit: int | None) -> Iterator[str]:
    """The differences by kind; of each at most `limit`, and how many more there are."""
    yield f"A  {found.a}"
    yield f"B  {found.b}"
    if found.is_equal:
        yield f"equal: {found.equal_tensors} tensors, configuration and files"
        return
    values = [(item.key, f"{_short(item.a)} -> {_short(item.b)}") for item in found.config]
    files = [(item.key, f"{_hash(item.a)} -> {_hash(item.b)}") for item in found.files]
    tensors = [(item.name, _tensor(item)) for item in found.tensors]
    for title, rows in (("configuration", values), ("files", files), ("tensors", tensors)):
        if rows:
            yield f"{title}: {len(rows)} different"
            yield from _table(rows, limit)
    yield f"{found.equal_tensors} tensors are equal"


def _table(rows: list[tuple[str, str]], limit: int | None) -> Iterator[str]:
    shown = rows[:limit]
    width = max(len(name) for name, _ in shown)
    yield from (f"  {name:<{width}}  {text}" for name, text in shown)
    if len(rows) > len(shown):
        yield f"  and {len(rows) - len(shown)} more (--all lists them)"


def _tensor(item: TensorDifference) -> str:
    if item.what.startswith("only"):
        return f"{item.what}: {item.a or item.b}"
    types = item.a if item.a == item.b else f"{item.a} -> {item.b}"
    if item.max_error is None or item.relative_rms is None:
        return f"{item.what}: {types}"
    return f"{item.what}: {types}, max error {item.max_error:.3g}, relative rms {item.relative_rms:.3g}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def _hash(value: Any) -> str:
    return str(value)[:12] if value else "absent"
