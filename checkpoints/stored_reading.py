"""Brings rows of a quantized tensor into the form of a recipe."""

from __future__ import annotations

import numpy as np

from trtllm.checkpoints.recipes import KeptOffsets, KeptScales, KeptValues
from trtllm.checkpoints.stored import IntegerForm, Offset, QuantizedTensor
from trtllm.errors import BadInputError


def integer_rows(tensor: QuantizedTensor, recipe: KeptValues, start: int, stop: int) -> np.ndarray:
    """int8 [rows, K], or uint8 [rows, K/2] with the even element in the low nibble."""
    form = _form(tensor, recipe.bits, Offset(recipe.offset))
    assert tensor.blocks is not None
    values = tensor.blocks.values(start, stop)
    if recipe.bits == 8:
        return values
    if form.offset is not Offset.NONE:
        values = values - np.int8(8)  # 0 .. 15 as int4 holds them
    return packed_nibbles(values)


def scale_rows(tensor: QuantizedTensor, recipe: KeptScales | KeptOffsets, start: int, stop: int) -> np.ndarray:
    """float16 [rows, K / block_size]."""
    assert tensor.blocks is not None and tensor.stored.integers is not None
    scales = tensor.blocks.scales(start, stop)
    return _in_blocks(tensor, scales, tensor.stored.integers.group_size // recipe.block_size)


def offset_rows(tensor: QuantizedTensor, recipe: KeptScales | KeptOffsets, start: int, stop: int) -> np.ndarray:
    """float16 [rows, K / block_size]; for a tensor without offsets, those that change nothing."""
    assert isinstance(recipe, KeptOffsets) and tensor.blocks is not None
    wanted = Offset(recipe.offset)
    form = _form(tensor, recipe.bits, wanted)
    repeats = form.group_size // recipe.block_size
    if form.offset is not Offset.NONE:
        assert tensor.blocks.offsets is not None
        return _in_blocks(tensor, tensor.blocks.offsets(start, stop), repeats)
    counted = np.float32(8 if recipe.bits == 4 else 0)  # int4 holds what counts from 0 less 8
    scales = tensor.blocks.scales(start, stop)
    offsets = np.full_like(scales, counted) if wanted is Offset.ZERO_POINT else -counted * scales
    return _in_blocks(tensor, offsets, repeats)


def packed_nibbles(values: np.ndarray) -> np.ndarray:
    """int8 [rows, K] in -8 .. 7 as uint8 [rows, K/2], the even element in the low nibble."""
    unsigned = values.view(np.uint8)
    return (unsigned[:, 0::2] & 15) | (unsigned[:, 1::2] << 4)


def _form(tensor: QuantizedTensor, bits: int, offset: Offset) -> IntegerForm:
    """The stored form, if what is wanted can hold it; a refit meets other checkpoints than the build did."""
    form = tensor.stored.integers
    if form is not None and form.bits <= bits and form.offset in (offset, Offset.NONE):
        return form
    raise BadInputError(
        f"tensor '{tensor.spec.name}' is stored as {tensor.stored.method}, which the engine's {bits}-bit integers "
        f"(offset: {offset.value}) do not hold",
        "the checkpoint is of another quantization; build the engine anew",
    )


def _in_blocks(tensor: QuantizedTensor, numbers: np.ndarray, repeats: int) -> np.ndarray:
    """Numbers of groups as float16 numbers of blocks. Raises BadInputError when float16 cannot hold one."""
    with np.errstate(over="ignore"):
        halves = numbers.astype(np.float16)
    if not np.isfinite(halves).all():
        raise BadInputError(
            f"tensor '{tensor.spec.name}' ({tensor.stored.method}) has a scale that float16 cannot hold",
            "build with --dequantize, or quantize anew with --quantization",
        )
    return halves.repeat(repeats, axis=1) if repeats > 1 else halves
