"""Optimization profiles: the ranges of batch and sequence that a plan is built for. It knows no library."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.engine import ProfileEntry
from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.network import ModelInfo
from trtllm.config import BuildConfig

SYMBOLS = ("batch", "sequence")
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def profiles(info: ModelInfo, build: BuildConfig) -> tuple[ProfileEntry, ...]:
    """The profiles of a network: one for whole inputs, and for a decoder one for single tokens after it.

    A step of the first holds at most max_num_tokens tokens, padding included: where the longest input times
    max_batch_size is more, it takes fewer rows.
    """
    context = _context(build)
    return (context, _generation(build)) if info.kind == "decoder" else (context,)


def _context(build: BuildConfig) -> ProfileEntry:
    assert build.max_input_len is not None, "the pipeline resolves it"
    longest = min(build.max_input_len, build.max_num_tokens)
    rows = max(1, min(build.max_batch_size, build.max_num_tokens // longest))
    expected_rows = min(build.opt_batch_size or 1, rows)
    expected_tokens = build.opt_num_tokens or expected_rows * ((longest + 1) // 2)
    expected = max(1, min(longest, expected_tokens // expected_rows))
    return ProfileEntry("context", (1, expected_rows, rows), (1, expected, longest))


def _generation(build: BuildConfig) -> ProfileEntry:
    most = build.max_batch_size
    expected = build.opt_batch_size or (most + 1) // 2
    return ProfileEntry("generation", (1, expected, most), (1, 1, 1))


def shapes_in(value: ir.Value, profile: ProfileEntry) -> Shapes:
    """The least, expected and largest shape of a graph input in a profile."""
    ranges = {"batch": profile.batch, "sequence": profile.sequence}

    def at(index: int) -> tuple[int, ...]:
        return tuple(extent if isinstance(extent, int) else ranges[extent][index] for extent in dims(value))

    return at(0), at(1), at(2)
