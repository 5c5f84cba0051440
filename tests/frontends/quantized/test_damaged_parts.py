"""Parts of bitsandbytes and compressed-tensors layers that are missing or do not fit are refused in two lines."""

from pathlib import Path

import numpy as np
import pytest

from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.errors import BadInputError, UnsupportedModelError

FIXTURES = Path(__file__).parent / "fixtures"
STATE = "weight.quant_state.bitsandbytes__nf4"


def arrays_of(name):
    file = SafetensorsFile(FIXTURES / f"{name}.safetensors")
    return {key.removeprefix("layer."): file.tensor(key).read() for key in file.specs if key != "expected"}


def refused(layer, method, arrays, config=None, named="layer"):
    """In two lines, of which the first names the layer, or the config where this is what misfits."""
    with pytest.raises(BadInputError) as caught:
        layer(method, config or {}, arrays)
    what, hint = str(caught.value).splitlines()
    assert (named in what or "no tensor is stored so" in what) and hint.strip()


@pytest.mark.parametrize("fixture", ["bitsandbytes_nf4", "bitsandbytes_nf4_nested", "bitsandbytes_int8"])
def test_every_part_of_bitsandbytes_is_needed_as_it_is(layer, fixture):
    arrays = arrays_of(fixture)
    for name, array in arrays.items():
        if name == "weight_format" or not array.shape:
            continue
        refused(layer, "bitsandbytes", arrays | {name: array[:-1]})
        if name not in ("SCB", STATE, "weight.nested_absmax"):
            refused(layer, "bitsandbytes", {key: part for key, part in arrays.items() if key != name})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"shape": [24], "blocksize": 64}', '{"shape": [24, 64], "blocksize": 0}']
)
def test_a_damaged_quant_state_is_refused(layer, text):
    state = np.frombuffer(text.encode(), np.uint8)
    refused(layer, "bitsandbytes", arrays_of("bitsandbytes_nf4") | {STATE: state})


@pytest.mark.parametrize(
    "fixture", ["compressed_int4", "compressed_int8_asymmetric", "compressed_int_quantized", "compressed_nvfp4"]
)
def test_every_part_of_compressed_tensors_is_needed_as_it_is(layer, fixture):
    arrays = arrays_of(fixture)
    for name, array in arrays.items():
        refused(layer, "compressed-tensors", arrays | {name: np.concatenate([array, array])})
        if name != "weight_zero_point":
            refused(layer, "compressed-tensors", {key: part for key, part in arrays.items() if key != name})


def test_a_stated_width_that_the_tensors_contradict_is_refused(layer):
    config = {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}
    refused(layer, "compressed-tensors", arrays_of("compressed_int4"), config)
    refused(layer, "compressed-tensors", arrays_of("compressed_int4"), {"config_groups": ["group_0"]}, "config_groups")


@pytest.mark.parametrize(
    "config",
    [
        {"format": "marlin-24"},
        {"config_groups": {"group_0": {"format": "mxfp4-pack-quantized"}}},
        {"sparsity_config": {"format": "sparse-24-bitmask"}},
        {"transform_config": {"config_groups": {"R1": {}}}},
    ],
)
def test_variants_that_are_not_read_are_refused_by_name(layer, config):
    with pytest.raises(UnsupportedModelError, match="compressed-tensors"):
        layer("compressed-tensors", config, arrays_of("compressed_int4"))
