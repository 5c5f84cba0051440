"""sha256 of a weight and of the file that it goes to, of the same bytes and, where the processor can, in one pass."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

from trtllm import _native


class Digest(Protocol):
    """A message that goes on, as hashlib's."""

    def update(self, payload: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


def new_sha256() -> Digest:
    """An empty message. Its `update` takes arrays and memoryviews and lets other threads run meanwhile."""
    return _native.Sha256() if _native.has_sha256_instructions() else hashlib.sha256()


def hashes_in_pairs() -> bool:
    """Whether `update_both` costs about what one message costs."""
    return _native.has_sha256_instructions()


def update_both(one: Digest, other: Digest, payload: Any) -> None:
    """Both messages go on with the payload; fast when both have as many bytes of a block of 64 begun."""
    if isinstance(one, _native.Sha256) and isinstance(other, _native.Sha256):
        _native.update_both(one, other, payload)
    else:
        one.update(payload)
        other.update(payload)
