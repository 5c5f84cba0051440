"""Opens one layer from arrays that a test has packed."""

import pytest

from trtllm.checkpoints.checkpoint import FunctionTensor, TensorSpec
from trtllm.dtypes import DType
from trtllm.frontends.quantized.config import QuantizationConfig
from trtllm.frontends.quantized.methods import open_quantized


def tensor(name, array):
    spec = TensorSpec(name, array.shape, DType.of_numpy(array.dtype))
    return FunctionTensor(spec, lambda start, stop: array[start:stop].copy() if array.shape else array.copy())


@pytest.fixture
def layer():
    """`layer("awq", config, arrays)`: the weight of the layer that has these parts."""

    def read(method, config, arrays):
        tensors = {f"layer.{ending}": tensor(f"layer.{ending}", array) for ending, array in arrays.items()}
        return open_quantized(tensors, QuantizationConfig(method, config, "a test")).tensors["layer.weight"]

    return read
