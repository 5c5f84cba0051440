"""Quantizes weight matrices to blocks of small integers, and converts among the float dtypes; the loops are in C++."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from trtllm import _native

BLOCK_SIZES = (16, 32, 64, 128, 256)
DTYPES: dict[str, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


class QuantizedBlocks(NamedTuple):
    """A matrix [N, K] as integers and the scales of its blocks: element = integer * scale of its block."""

    values: npt.NDArray[Any]
    """4 bits: uint8 [N, K/2], two's complement, element 2i in the low nibble. 8 bits: int8 [N, K]."""
    scales: npt.NDArray[Any]
    """[N, K/block_size], in the scale dtype asked for. At 4 bits a scale may be negative."""


class CountedBlocks(NamedTuple):
    """A matrix [N, K] as integers that count from 0: element = integer * scale + minimum of its block."""

    values: npt.NDArray[Any]
    """uint8 [N, K/2], integers 0 .. 15 less 8 in two's complement, element 2i in the low nibble."""
    scales: npt.NDArray[Any]
    """float16 [N, K/block_size], never negative."""
    minima: npt.NDArray[Any]
    """float16 [N, K/block_size]."""


def quantize_blocks(
    x: npt.NDArray[Any],
    bits: int,
    block_size: int,
    scale_dtype: str = "float32",
    *,
    search: bool = False,
    importance: npt.NDArray[Any] | None = None,
    tiled: bool = False,
    threads: int = 0,
) -> QuantizedBlocks:
    """Quantize each row's blocks symmetrically, rounding to the nearest integer, halves to even.

    The integers are taken against the scale as stored, after its rounding to `scale_dtype`.

    - 4 bits: scale = m / -8, where m is the block's element of largest magnitude, so that m itself becomes -8 and the
      whole range -8..7 is used. Of two elements as large, the negative counts.
    - 8 bits: scale = max|x| / 127, integers -127..127.

    A block of zeros, or one whose scale rounds to zero, becomes zeros with scale 0.

    With `search` a 4-bit block takes the scale of least squared error that is found near the plain one, never a worse
    one; 8-bit blocks keep the plain one.

    Args:
        x: [N, K], float32, float16 or bfloat16 (ml_dtypes).
        bits: 4 or 8.
        block_size: one of BLOCK_SIZES; divides K.
        scale_dtype: "float32", "float16" or "bfloat16".
        search: look for scales of least squared error.
        importance: float32 [K] or None, weighs the squared errors of a row's columns in the search.
        tiled: give the values as `tile` would; of blocks of 32, without importance.
        threads: 0 means as many as the machine has.

    Raises:
        ValueError: a wrong shape or dtype, NaN or infinity in `x`, or a scale that `scale_dtype` cannot hold.
    """
    name = _name_of(x)
    if x.ndim != 2:
        raise ValueError(f"a matrix [N, K] is wanted, this has shape {x.shape}")
    if bits not in (4, 8):
        raise ValueError(f"bits is 4 or 8, not {bits}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is one of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}")
    if scale_dtype not in DTYPES:
        raise ValueError(f"scale_dtype is one of {', '.join(DTYPES)}, not '{scale_dtype}'")
    rows, columns = x.shape
    if columns % block_size:
        raise ValueError(f"K = {columns} is no multiple of block_size {block_size}")

    if importance is not None and (importance.shape != (columns,) or importance.dtype != np.float32):
        raise ValueError(f"importance is {importance.dtype} {importance.shape}, float32 ({columns},) is wanted")

    if tiled:
        values: npt.NDArray[Any] = np.empty((-(-rows // 16), columns // 32, 64 * bits), np.uint8)
    else:
        values = np.empty((rows, columns // 2), np.uint8) if bits == 4 else np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // block_size), DTYPES[scale_dtype])
    wanted: dict[str, Any] = {"search": True, "importance": importance} if search else {}
    if tiled:
        wanted["tiled"] = True
    fault, block = _native.quantize_blocks(
        _as_words(x), name, bits, block_size, values, _as_words(scales), scale_dtype, threads, **wanted
    )  # fmt: skip
    if fault == "not_finite":
        raise ValueError(f"row {block // scales.shape[1]} holds NaN or infinity; such weights cannot be quantized")
    if fault:
        row = block // scales.shape[1]
        raise ValueError(f"row {row} needs a scale too large for {scale_dtype}; use float32 scales")
    return QuantizedBlocks(values, scales)


def quantize_counted(
    x: npt.NDArray[Any],
    block_size: int,
    *,
    search: bool = False,
    importance: npt.NDArray[Any] | None = None,
    threads: int = 0,
) -> CountedBlocks:
    """Quantize each row's blocks to 4 bits with a minimum, rounding to the nearest integer, halves to even.

    minimum = the block's smallest element and scale = (the largest - minimum) / 15, both in float16; integers are taken
    against them as stored. With `search` a block takes scale and minimum of least squared error, weighted by
    `importance`, found near the plain ones, never worse ones. Weights that lie on such a grid already are kept exactly.

    Args:
        x: [N, K], float32, float16 or bfloat16 (ml_dtypes).
        block_size: one of BLOCK_SIZES; divides K.
        importance: float32 [K] or None.

    Raises:
        ValueError: a wrong shape or dtype, NaN or infinity in `x`, or what float16 cannot hold.
    """
    name = _name_of(x)
    if x.ndim != 2 or block_size not in BLOCK_SIZES or x.shape[1] % block_size:
        raise ValueError(f"a matrix [N, K] of whole blocks of {block_size} is wanted, this has shape {x.shape}")
    rows, columns = x.shape
    if importance is not None and (importance.shape != (columns,) or importance.dtype != np.float32):
        raise ValueError(f"importance is {importance.dtype} {importance.shape}, float32 ({columns},) is wanted")
    values = np.empty((rows, columns // 2), np.uint8)
    scales, minima = (np.empty((rows, columns // block_size), np.float16) for _ in range(2))
    fault, block = _native.quantize_blocks(
        _as_words(x), name, 4, block_size, values, scales.view(np.uint16), "float16", threads, search=search,
        importance=importance, minima=minima.view(np.uint16),
    )  # fmt: skip
    if fault == "not_finite":
        raise ValueError(f"row {block // scales.shape[1]} holds NaN or infinity; such weights cannot be quantized")
    if fault:
        raise ValueError(
            f"row {block // scales.shape[1]} holds values too large for float16 scales; keep it unquantized"
        )
    return CountedBlocks(values, scales, minima)


def gptq(
    weights: npt.NDArray[np.float32],
    factor: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32],
    bits: int,
    block_size: int,
    *,
    order: npt.NDArray[np.int32] | None = None,
    counted: bool = False,
    threads: int = 0,
) -> QuantizedBlocks | CountedBlocks:
    """Quantize columns in order, each one's error spread over those that come later; scales are float16 and searched.

    Args:
        weights: [N, K].
        factor: [K, K], upper triangular U with U'U the inverse of the inputs' damped second moments, in
            the order of `order`.
        importance: [K], weighs squared errors when scales are searched.
        bits: 4 or 8.
        block_size: divides K.
        order: [K], the columns as they are rounded; scales are then those of the weights as given. None: from the first
            to the last, each block's scales chosen when it is reached.
        counted: blocks have minima; of 4 bits only.
        threads: 0 means as many as the machine has; the result does not depend on it.

    Raises:
        ValueError: a scale that is not finite.
    """
    rows, columns = weights.shape
    values = np.empty((rows, columns // 2), np.uint8) if bits == 4 else np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // block_size), np.float16)
    minima = np.empty_like(scales) if counted else None
    is_good = _native.gptq(
        np.array(weights, np.float32, order="C"),
        np.ascontiguousarray(factor, np.float32),
        np.arange(columns, dtype=np.int32) if order is None else np.ascontiguousarray(order, np.int32),
        np.ascontiguousarray(importance, np.float32),
        bits, block_size, order is not None, values, scales.view(np.uint16),
        None if minima is None else minima.view(np.uint16), threads,
    )  # fmt: skip
    if not is_good:
        raise ValueError("a block needs a scale that float16 does not hold")
    if minima is not None:
        return CountedBlocks(values, scales, minima)
    return QuantizedBlocks(values, scales)


def dequantize_blocks(blocks: QuantizedBlocks | CountedBlocks, bits: int) -> npt.NDArray[np.float32]:
    """The matrix [N, K] that quantized blocks stand for."""
    values = blocks.values
    if bits == 4:
        low, high = (values << 4).view(np.int8) >> 4, values.view(np.int8) >> 4
        values = np.stack([low, high], axis=-1).reshape(len(values), -1)
    scales = blocks.scales.astype(np.float32)
    rows, count = scales.shape
    result: npt.NDArray[np.float32] = values.astype(np.float32).reshape(rows, count, -1)
    if isinstance(blocks, CountedBlocks):
        result += np.float32(8)
    result *= scales[..., None]
    if isinstance(blocks, CountedBlocks):
        result += blocks.minima.astype(np.float32)[..., None]
    return result.reshape(rows, -1)


def convert(x: npt.NDArray[Any], to: str, *, threads: int = 0) -> npt.NDArray[Any]:
    """Copy `x` to another float dtype, rounded to nearest even; what float16 cannot hold becomes infinity."""
    name = _name_of(x)
    if to not in DTYPES:
        raise ValueError(f"cannot convert to '{to}'; known: {', '.join(DTYPES)}")
    result = np.empty(x.shape, DTYPES[to])
    _native.convert(_as_words(x), name, _as_words(result), to, threads)
    return result


def _name_of(x: npt.NDArray[Any]) -> str:
    if x.dtype.name not in DTYPES or not x.dtype.isnative:
        raise ValueError(f"dtype {x.dtype} is none of {', '.join(DTYPES)}")
    return x.dtype.name


def _as_words(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory, contiguous, in a dtype that the extension's arrays can carry: 16-bit floats become uint16."""
    contiguous = np.ascontiguousarray(x)
    return contiguous if contiguous.itemsize == 4 else contiguous.view(np.uint16)


def transpose_into(result: npt.NDArray[Any], first: int, values: npt.NDArray[Any]) -> None:
    """`result[:, first : first + len(values)] = values.T`, faster; matrices of elements of 2 or 4 bytes."""
    word = np.uint16 if values.itemsize == 2 else np.uint32
    _native.transpose(np.ascontiguousarray(values).view(word), result.view(word), first)


def tile(rows: npt.NDArray[Any], bits: int, blocks: int, *, threads: int = 0) -> npt.NDArray[Any]:
    """Rearrange rows into tiles of 16, the layout of the CPU kernel (runtime/native/quantized_linear.h).

    Args:
        rows: what `quantize_blocks` gave for blocks of 32: values (bits 4 or 8), or float16 scales (bits 16).
        blocks: blocks of a row.

    Returns:
        uint8 [tiles, blocks, 64 * bits], or float16 [tiles, blocks, 16]; rows missing in the last tile are zeros.
    """
    count = -(-len(rows) // 16)
    shape, dtype = ((count, blocks, 16), np.float16) if bits == 16 else ((count, blocks, 64 * bits), np.uint8)
    tiles = np.empty(shape, dtype)
    source = np.ascontiguousarray(rows)
    _native.tile(source.view(np.uint8), len(rows), blocks, bits, tiles.view(np.uint8), threads)
    return tiles
