"""sha256 of a weight and of the file that it goes to, of the same bytes and, where the processor can, in one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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


def update_in_turn(whole: Digest, digests: Sequence[Digest], payloads: Sequence[Any]) -> None:
    """`update_both(whole, digest, payload)` of each pair; other threads run until all is done."""
    if isinstance(whole, _native.Sha256):
        _native.update_in_turn(whole, digests, payloads)
    else:
        for digest, payload in zip(digests, payloads, strict=True):
            update_both(whole, digest, payload)


def update_each(digests: Sequence[Digest], payloads: Sequence[Any]) -> None:
    """Each message goes on with its payload."""
    for digest, payload in zip(digests, payloads, strict=True):
        digest.update(payload)
