"""The integer form of each GGUF type against what the gguf package dequantizes, to the last bit."""

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from trtllm.checkpoints.file_reads import FileReads
from trtllm.checkpoints.stored import Offset, dequantized
from trtllm.frontends.gguf.blocks import BLOCK_TYPES
from trtllm.frontends.gguf.container import GgufTensor
from trtllm.frontends.gguf.payloads import as_stored, expert, rotary_halves

ROWS, COLUMNS = 32, 512
WITH_FORM = sorted(BLOCK_TYPES, key=lambda kind: kind.name)
WITHOUT_FORM = [GGMLQuantizationType[name] for name in ("Q2_K", "Q3_K", "Q6_K", "IQ4_XS", "IQ2_XXS")]


def _random_payload(kind, generator, rows=ROWS):
    """Random bits, but for the scales, which are ordinary float16 numbers."""
    block, nbytes = GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (rows * COLUMNS // block, nbytes), dtype=np.uint8)
    halves = {"Q6_K": [208], "Q3_K": [108], "Q2_K": [80, 82], "Q4_1": [0, 2], "Q5_1": [0, 2]}.get(
        kind.name, [0, 2] if kind.name in ("Q4_K", "Q5_K") else [0]
    )
    for offset in halves:
        scales = generator.normal(size=len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


@pytest.fixture
def stored(tmp_path):
    """`stored(kind)`: a random tensor of that type in a file, and its dequantized rows."""

    def make(kind, shape=(ROWS, COLUMNS)):
        payload = _random_payload(kind, np.random.default_rng(kind.value), int(np.prod(shape[:-1])))
        path = tmp_path / kind.name
        path.write_bytes(bytes(64) + payload.tobytes())
        return GgufTensor("x", shape, kind, FileReads(path), 64), gguf.quants.dequantize(payload, kind)

    return make


@pytest.mark.parametrize("kind", WITH_FORM, ids=lambda kind: kind.name)
def test_integers_scales_and_minima_make_the_dequantized_elements(stored, kind):
    tensor, expected = stored(kind)
    lazy = as_stored(tensor, "x")
    form = lazy.stored.integers
    assert (form.offset is Offset.MINIMUM) == (lazy.blocks.offsets is not None)
    values = lazy.blocks.values(0, ROWS)
    lowest, highest = (-128, 127) if form.bits == 8 else (0, 15) if form.offset is Offset.MINIMUM else (-8, 7)
    assert values.dtype == np.int8 and lowest <= values.min() and values.max() <= highest
    np.testing.assert_array_equal(dequantized(lazy.blocks, form, 0, ROWS), expected)
    np.testing.assert_array_equal(dequantized(lazy.blocks, form, 5, 9), expected[5:9])
    np.testing.assert_array_equal(lazy.read(5, 9), expected[5:9])


@pytest.mark.parametrize("kind", WITH_FORM, ids=lambda kind: kind.name)
def test_a_form_that_claims_exact_scales_has_float16_scales(stored, kind):
    lazy = as_stored(stored(kind)[0], "x")
    parts = [lazy.blocks.scales(0, ROWS)]
    if lazy.blocks.offsets is not None:
        parts.append(lazy.blocks.offsets(0, ROWS))
    is_exact = all(np.array_equal(part.astype(np.float16).astype(np.float32), part) for part in parts)
    assert is_exact == lazy.stored.integers.is_exact


@pytest.mark.parametrize("kind", WITHOUT_FORM, ids=lambda kind: kind.name)
def test_types_with_scales_within_a_block_have_no_form_and_are_read(stored, kind):
    tensor, expected = stored(kind)
    lazy = as_stored(tensor, "x")
    assert lazy.stored.integers is None and lazy.blocks is None and lazy.stored.coarse
    np.testing.assert_array_equal(lazy.read(3, 30), expected[3:30])


@pytest.mark.parametrize("kind", WITH_FORM, ids=lambda kind: kind.name)
def test_rows_of_heads_are_put_in_order_in_every_part(stored, kind):
    tensor, rows = stored(kind)
    head = 8
    expected = rows.reshape(-1, head // 2, 2, COLUMNS).swapaxes(1, 2).reshape(rows.shape)
    lazy = rotary_halves(tensor, "x", head)
    np.testing.assert_array_equal(dequantized(lazy.blocks, lazy.stored.integers, 3, 21), expected[3:21])
    np.testing.assert_array_equal(lazy.read(3, 21), expected[3:21])


@pytest.mark.parametrize("kind", WITH_FORM, ids=lambda kind: kind.name)
def test_an_expert_is_its_rows_of_the_stack(stored, kind):
    tensor, rows = stored(kind, (4, 8, COLUMNS))
    lazy = expert(tensor, "x", 2)
    np.testing.assert_array_equal(dequantized(lazy.blocks, lazy.stored.integers, 0, 8), rows[16:24])
