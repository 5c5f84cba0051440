"""Reads byte ranges of a file into fresh arrays, without mapping it.

A mapped page counts as resident memory of the process once it was touched, and a build touches every page of a
checkpoint. Reads with pread leave the pages in the system's cache, where they cost the process nothing: that is how a
build of a 16 GB checkpoint stays under 3 GB. What is borrowed for a moment is mapped after all, without a copy, where
the cache has it: that range alone, until the array goes.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

import numpy as np

from trtllm import _native
from trtllm.errors import BadInputError

_WORTH_MAPPING = 128 << 10
"""Bytes below which a copy costs no more than a mapping."""
_LARGEST_READ = 1 << 30
"""Linux returns at most 2 GiB from one read."""


class FileReads:
    """An open file that any number of threads may read at once; closed when it is collected."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise BadInputError(f"cannot open {path}: {error.strerror}", "check the path and its permissions") from None
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """`nbytes` bytes from `offset` as uint8. Raises BadInputError when the file ends before them."""
        array = np.empty(nbytes, dtype=np.uint8)
        view, done = array.data, 0
        while done < nbytes:
            count = self._read_into(view[done : done + _LARGEST_READ], offset + done)
            if count == 0:
                raise BadInputError(
                    f"{self.path} ends at byte {offset + done}, {offset + nbytes} were expected",
                    "the file was cut short or changed while it was read; fetch it again",
                )
            done += count
        return array

    def borrow(self, offset: int, nbytes: int) -> np.ndarray:
        """As `read`, or the bytes in the page cache themselves, read-only.

        Let go of it soon: it counts as memory of the process like a copy, but follows changes of the file, and touching
        it fails hard once the file was cut short.
        """
        mapped: np.ndarray | None = None
        if nbytes >= _WORTH_MAPPING:
            mapped = _native.map_cached(self._descriptor, offset, nbytes)
        return self.read(offset, nbytes) if mapped is None else mapped

    def _read_into(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptor, [view], offset)
        except OSError as error:
            raise BadInputError(f"cannot read {self.path}: {error.strerror}", "check the disk it lies on") from None
