"""Schemes of small formats: graphs before and after, activations rounded as the scheme says, layers left out."""

import numpy as np
import pytest

from trtllm.compiler.ir.dialect import is_dialect
from trtllm.dtypes import DType
from trtllm.passes.base import ChannelRanges
from trtllm.passes.lower_scaled import LowerScaled
from trtllm.passes.quantize_scaled import QuantizeScaled, smoothing_vector

KERNEL = "trtllm.cpu::ScaledLinear"
SCHEMES = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "W8A8", "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN",
    "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", "NVFP4", "W4A16_MXFP4",
)  # fmt: skip


def _network(small, *, norm=False, inputs=160, outputs=40):
    x = small.b.input("x", DType.FLOAT32, ("rows", inputs))
    y = small.b.dialect("RMSNorm", [x, small.weight("norm", inputs)]) if norm else x
    y = small.b.dialect("Linear", [y, small.weight("w", outputs, inputs), small.weight("bias", outputs)], name="linear")
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


def test_smoothing_moves_ranges_and_keeps_the_product(small, context_for, evaluate) -> None:
    """Without rounding the product would be the same: an outlier channel costs far less than it does unsmoothed."""
    network, data = _network(small, norm=True), _data(64)
    data["x"][:, 3] *= 40
    (expected,) = evaluate(small, network, data)
    (normed,) = (
        data["x"] / np.sqrt((data["x"] ** 2).mean(axis=1, keepdims=True)) * small.tensors["norm"].read(0, 160),
    )
    weight = small.tensors["w"].read(0, 40)
    context = context_for(quantization="W8A8_SQ_PER_CHANNEL")
    context.ranges["w"] = ChannelRanges(np.abs(normed).max(axis=0), np.abs(weight).max(axis=0))
    QuantizeScaled().run(network, context)
    (smooth,) = evaluate(small, network, data)
    plain = np.abs(normed).max() / 127 * np.sqrt(160 / 12) * np.abs(weight).mean()
    assert 0 < np.abs(smooth - expected).mean() < plain
    norm = next(node for node in network.graph if is_dialect(node, "RMSNorm"))
    assert norm.inputs[1].name == "norm_smooth"


def test_a_smoothing_vector_balances_both_ranges() -> None:
    vector = smoothing_vector(np.array([8.0, 2, 0, 5]), np.array([2.0, 0.5, 1, 0]), 0.5)
    np.testing.assert_allclose(vector, [2, 2, 1, 1], rtol=2**-23)


def test_what_a_norm_gives_to_others_too_is_not_smoothed(small, context_for) -> None:
    network = _network(small, norm=True)
    norm = next(node for node in network.graph if is_dialect(node, "RMSNorm"))
    small.b.output(small.b.op("Identity", [norm.outputs[0]]), "z")
    context = _ranged(context_for(quantization="W8A8_SQ_PER_CHANNEL"), small, network, _data())
    assert QuantizeScaled().run(network, context) == 1
    assert norm.inputs[1].name == "norm"


def test_excluded_modules_keep_their_precision(small, context_for) -> None:
    network = _network(small)
    assert QuantizeScaled().run(network, context_for(quantization="FP8", exclude_modules=("w",))) == 0


def test_a_weight_that_does_not_fit_the_format_says_so(small, context_for) -> None:
    network = _network(small, inputs=24)
    context = context_for(quantization="NVFP4")
    assert QuantizeScaled().run(network, context) == 0
    assert any("24 inputs are no multiple of 16" in note for note in context.notes)
