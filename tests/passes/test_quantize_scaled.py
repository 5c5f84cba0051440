"""Schemes of small formats: graphs before and after, activations rounded as the scheme says, layers left out."""

import numpy as np
import pytest

from trtllm.dtypes import DType
from trtllm.passes.base import ChannelRanges
from trtllm.passes.lower_scaled import LowerScaled
from trtllm.passes.quantize_scaled import QuantizeScaled

KERNEL = "trtllm.cpu::ScaledLinear"
SCHEMES = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "W8A8", "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", "NVFP4", "W4A16_MXFP4",
)  # fmt: skip


def _network(small, *, inputs=160, outputs=40):
    x = small.b.input("x", DType.FLOAT32, ("rows", inputs))
    y = small.b.dialect("Linear", [x, small.weight("w", outputs, inputs), small.weight("bias", outputs)], name="linear")
    small.b.output(y, "y")
    return small.finish()


def _data(rows=5, inputs=160):
    random = np.random.default_rng(7)
    return {"x": (random.normal(size=(rows, inputs)) * random.choice([0.1, 1, 3], (rows, 1))).astype(np.float32)}


def _ranged(context, small, network, data):
    """The context with what the linear layer sees of the data."""
    weight = small.tensors["w"].read(0, small.tensors["w"].spec.shape[0])
    context.ranges["w"] = ChannelRanges(np.abs(data["x"]).max(axis=0), np.abs(weight).max(axis=0))
    return context


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_product_strays_by_no_more_than_its_roundings(small, context_for, evaluate, scheme) -> None:
    network, data = _network(small), _data()
    (expected,) = evaluate(small, network, data)
    context = _ranged(context_for(quantization=scheme), small, network, data)
    assert QuantizeScaled().run(network, context) == 1
    (actual,) = evaluate(small, network, data)
    weight = small.tensors["w"].read(0, 40)
    steps = {"F": 2**-4, "W8": 0.5 / 127, "NV": 0.25, "W4": 1 / 3}  # half a step, of the largest that shares its scale
    step = next(value for key, value in steps.items() if scheme.startswith(key))
    error = step * np.abs(weight).max() * np.ones_like(weight)
    noise = 0.0 if scheme == "W4A16_MXFP4" else step * np.abs(data["x"]).max()
    bound = np.abs(data["x"]) @ error.T + noise * np.abs(weight).sum(axis=1) + noise * error.sum(axis=1)
    assert (np.abs(actual - expected) <= bound + 1e-5).all()
    assert np.abs(actual - expected).max() > 1e-4  # something was rounded


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_kernel_computes_what_the_reference_body_does(small, context_for, evaluate, scheme, rows) -> None:
    network, data = _network(small), _data(rows)
    context = _ranged(context_for(KERNEL, quantization=scheme), small, network, data)
    QuantizeScaled().run(network, context)
    (expected,) = evaluate(small, network, data)
    assert LowerScaled().run(network, context) == 1
    (actual,) = evaluate(small, network, data)
    weight = np.abs(small.tensors["w"].read(0, 40))
    bound = 2 * 200 * 2.0**-24 * (1.4 * np.abs(data["x"]).max() * weight.sum(axis=1)).max()  # 200 roundings each way
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def test_excluded_modules_keep_their_precision(small, context_for) -> None:
    network = _network(small)
    assert QuantizeScaled().run(network, context_for(quantization="FP8", exclude_modules=("w",))) == 0


def test_a_weight_that_does_not_fit_the_format_says_so(small, context_for) -> None:
    network = _network(small, inputs=24)
    context = context_for(quantization="NVFP4")
    assert QuantizeScaled().run(network, context) == 0
    assert any("24 inputs are no multiple of 16" in note for note in context.notes)
