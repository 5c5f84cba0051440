"""How long work reports that it goes on; the command line draws it, a library call is silent."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives stages and the steps within them."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins; `total` is its size in bytes or steps, None when unknown."""
        ...

    def advance(self, amount: int) -> None:
        """`amount` more of the stage's total is done."""
        ...

    def note(self, text: str) -> None:
        """Something that the user should know of the result."""
        ...


class Silent:
    """A Progress that says nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
