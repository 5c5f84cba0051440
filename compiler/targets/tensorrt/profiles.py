"""Optimization profiles: the extents that a plan is built for. It knows no library.

A cache that is extended in place has two, of ranges. One that is read through block tables has a profile for every
shape that steps are cut to: a plan for one shape alone runs as a CUDA graph, and one for a range does not.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from trtllm.compiler.engine import ProfileEntry
from trtllm.compiler.ir.builder import dims
from trtllm.compiler.ir.network import ModelInfo
from trtllm.config import BuildConfig

SYMBOLS = ("batch", "sequence", "columns")
PREFILL_LENGTHS = (16, 64, 256, 1024)
TABLE_LENGTHS = (256, 1024)
"""Tokens, where the build names none; the longest sequence comes on top."""
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def profiles(info: ModelInfo, build: BuildConfig, *, gathers_cache: bool = False) -> tuple[ProfileEntry, ...]:
    """The profiles of a network: one for whole inputs, and for a decoder one for single tokens after it.

    A step of the first holds at most max_num_tokens tokens, padding included: where the longest input times
    max_batch_size is more, it takes fewer rows.
    """
    if gathers_cache and info.kind == "decoder":
        return fixed_profiles(build)
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


def fixed_profiles(build: BuildConfig) -> tuple[ProfileEntry, ...]:
    """One shape each: rows of one token, and one row of several, over tables of each length.

    A prompt's first chunk and short answers read short tables; a table is never shorter than what is computed over it.
    """
    found = [
        _fixed("generation", rows, 1, columns) for rows in decode_batches(build) for columns in table_columns(build)
    ]
    found += [
        _fixed("context", 1, tokens, columns)
        for tokens in prefill_lengths(build)
        for columns in _prefill_columns(build)
    ]
    return tuple(found)


def decode_batches(build: BuildConfig) -> tuple[int, ...]:
    """Powers of two up to max_batch_size, which is always there."""
    most = build.max_batch_size
    usual = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return _ascending([*(build.tensorrt_decode_batches or usual), most], most)


def prefill_lengths(build: BuildConfig) -> tuple[int, ...]:
    """Tokens of a chunk; the longest is the longest prompt, or the largest of the usual lengths."""
    assert build.max_input_len is not None, "the pipeline resolves it"
    most = min(build.max_input_len, build.max_num_tokens)
    if build.tensorrt_prefill_lengths:
        return _ascending(build.tensorrt_prefill_lengths, most)
    return _ascending([*PREFILL_LENGTHS, min(most, PREFILL_LENGTHS[-1])], most)


def table_columns(build: BuildConfig) -> tuple[int, ...]:
    """Blocks of a row's table; the longest holds max_seq_len tokens."""
    assert build.max_seq_len is not None, "the pipeline resolves it"
    lengths = build.tensorrt_table_lengths or TABLE_LENGTHS
    most = _blocks(build.max_seq_len, build)
    return _ascending([*(_blocks(length, build) for length in lengths), most], most)


def _prefill_columns(build: BuildConfig) -> tuple[int, ...]:
    """A first chunk has nothing behind it, later ones may have anything."""
    return _ascending([1, table_columns(build)[-1]], table_columns(build)[-1])


def _blocks(tokens: int, build: BuildConfig) -> int:
    return -(-tokens // build.tensorrt_tokens_per_block)


def _ascending(numbers: Iterable[int], most: int) -> tuple[int, ...]:
    return tuple(sorted({number for number in numbers if 1 <= number <= most}))


def _fixed(name: str, batch: int, sequence: int, columns: int) -> ProfileEntry:
    return ProfileEntry(name, (batch,) * 3, (sequence,) * 3, (columns,) * 3)


def longest_extent(planned: Iterable[ProfileEntry], build: BuildConfig) -> int:
    """The largest number that a graph counts to: rows, new tokens, tokens of a table."""
    extents = (
        max(entry.batch[2], entry.sequence[2], entry.columns[2] * build.tensorrt_tokens_per_block) for entry in planned
    )
    return max(extents)


def shapes_in(value: ir.Value, profile: ProfileEntry) -> Shapes:
    """The least, expected and largest shape of a graph input in a profile."""
    ranges = {"batch": profile.batch, "sequence": profile.sequence, "columns": profile.columns}

    def at(index: int) -> tuple[int, ...]:
        return tuple(extent if isinstance(extent, int) else ranges[extent][index] for extent in dims(value))

    return at(0), at(1), at(2)
