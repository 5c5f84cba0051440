"""Layers that the libraries quantized read as what the libraries dequantize."""

from pathlib import Path

import numpy as np
import pytest

from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.checkpoints.stored import Offset, dequantized
from trtllm.dtypes import DType
from trtllm.frontends.quantized.config import QuantizationConfig
from trtllm.frontends.quantized.methods import open_quantized

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.stem for path in FIXTURES.glob("*.safetensors"))


def opened(name):
    """The layer of a fixture, and the rows that its library made of it."""
    file = SafetensorsFile(FIXTURES / f"{name}.safetensors")
    tensors = {key: file.tensor(key) for key in file.specs if key != "expected"}
    method = "bitsandbytes" if name.startswith("bitsandbytes") else "compressed-tensors"
    weights = open_quantized(tensors, QuantizationConfig(method, {}, "a fixture")).tensors
    assert list(weights) == ["layer.weight"]
    return weights["layer.weight"], file.tensor("expected").read()


def test_every_fixture_is_there():
    assert len(NAMES) == 13


@pytest.mark.parametrize("name", NAMES)
def test_the_dequantized_rows_are_those_of_the_library(name):
    layer, expected = opened(name)
    assert (layer.spec.shape, layer.spec.dtype) == (expected.shape, DType.FLOAT32)
    # by 127: one product and one quotient, or a product by 1/127; nvfp4: two roundings to the library's bfloat16
    tolerance = {"bitsandbytes_int8": 2.0**-22, "compressed_nvfp4": 2.0**-8}.get(name, 0)
    np.testing.assert_allclose(layer.read(), expected.astype(np.float32), rtol=tolerance)
    np.testing.assert_array_equal(layer.read(5, 13), layer.read()[5:13])


@pytest.mark.parametrize("name", NAMES)
def test_integers_scales_and_offsets_make_the_dequantized_rows(name):
    layer, _ = opened(name)
    form = layer.stored.integers
    has_form = not name.startswith(("bitsandbytes_nf4", "bitsandbytes_fp4", "compressed_float", "compressed_nvfp4"))
    assert (form is not None) == has_form
    if form is None:
        assert layer.stored.coarse == (name != "compressed_float_quantized")
        return
    assert (form.offset is Offset.ZERO_POINT) == name.endswith("asymmetric")
    assert form.bits == (4 if "int4" in name else 8)
    values = layer.blocks.values(3, 9)
    lowest, highest = (-128, 127) if form.bits == 8 else (0, 15) if form.offset is Offset.ZERO_POINT else (-8, 7)
    assert values.dtype == np.int8 and lowest <= values.min() and values.max() <= highest
    np.testing.assert_array_equal(dequantized(layer.blocks, form, 3, 9), layer.read(3, 9))
