"""Smoothing: graphs before and after, what takes the division up, and what it is worth where channels stand out."""

import numpy as np
import pytest

from trtllm.checkpoints.checkpoint import FunctionTensor
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.dtypes import DType
from trtllm.passes.base import ChannelRanges
from trtllm.passes.pack import PackGateUp
from trtllm.passes.quantize_scaled import QuantizeScaled, divisors_of
from trtllm.passes.smooth import SmoothActivations, smoothing_vector

SQ = "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
WIDTH, HIDDEN = 96, 64


def _mlp(small, kind="silu", *, gated=True, bias=False):
    """norm -> gate and up -> activation -> down, or norm -> up -> activation -> down."""

    def linear(x, name, outputs, inputs):
        given = [x, small.weight(f"{name}.weight", outputs, inputs)]
        return small.b.dialect("Linear", [*given, small.weight(f"{name}.bias", outputs)] if bias else given, name=name)

    x = small.b.input("x", DType.FLOAT32, ("rows", HIDDEN))
    y = small.b.dialect("RMSNorm", [x, small.weight("norm", HIDDEN)], name="norm")
    if gated:
        parts = [linear(y, name, WIDTH, HIDDEN) for name in ("gate", "up")]
        y = small.b.dialect("GatedActivation", parts, name="act", kind=kind)
    else:
        y = small.b.dialect("Activation", [linear(y, "up", WIDTH, HIDDEN)], name="act", kind=kind)
    small.b.output(linear(y, "down", HIDDEN, WIDTH), "y")
    return small.finish()


def _data(rows=48):
    return {"x": np.random.default_rng(7).normal(size=(rows, HIDDEN)).astype(np.float32)}


def _measured(small, network, evaluate, data):
    """What every linear layer reads, from a copy of the graph whose inputs of layers are outputs."""
    nodes = [node for node in network.graph if is_dialect(node, "Linear")]
    values = list(dict.fromkeys(node.inputs[0] for node in nodes))
    network.graph.outputs.extend(values)
    _, *found = evaluate(small, network, data)
    for _ in values:
        network.graph.outputs.pop()
    seen = dict(zip(values, found, strict=True))
    return {
        node.inputs[1].name: ChannelRanges(
            np.abs(seen[node.inputs[0]]).max(axis=0),
            np.abs(small.tensors[node.inputs[1].name].read(0, node.inputs[1].shape[0])).max(axis=0),
        )
        for node in nodes
    }


def _linear(network, name):
    return next(node for node in network.graph if node.name == name)


def _payload(small, node, index=1):
    return RecipeReader(small.tensors).read(node.inputs[index].const_value.recipe)


def _plant(small, name, place, factor):
    """Multiplies a part of a tensor of the checkpoint."""
    tensor = _published(small, name)
    tensor[place] *= factor
    spec = small.tensors[name].spec
    small.tensors[name] = FunctionTensor(spec, lambda start, stop: tensor[start:stop].copy())


def _published(small, name):
    tensor = small.tensors[name]
    return tensor.read(0, tensor.spec.shape[0])


def test_a_smoothing_vector_balances_both_ranges() -> None:
    vector = smoothing_vector(np.array([8.0, 2, 0, 5]), np.array([2.0, 0.5, 1, 0]), 0.5)
    np.testing.assert_allclose(vector, [2, 2, 1, 1], rtol=2**-23)


def test_a_norm_and_the_rows_of_the_gated_half_take_the_division_up(small, context_for, evaluate) -> None:
    network, data = _mlp(small, bias=True), _data()
    context = context_for(quantization=SQ)
    context.ranges.update(_measured(small, network, evaluate, data))
    assert SmoothActivations().run(network, context) == 2
    assert context.notes == []
    up, down = _linear(network, "up"), _linear(network, "down")
    inner, outer = (divisors_of(node.inputs[1].const_value.recipe) for node in (up, down))
    norm = next(node for node in network.graph if node.op_type == "RMSNorm")
    np.testing.assert_allclose(_payload(small, norm), _published(small, "norm") / inner, rtol=2**-22)
    expected = _published(small, "up.weight") * inner / outer[:, None]
    np.testing.assert_allclose(_payload(small, up), expected, rtol=2**-22)
    np.testing.assert_allclose(_payload(small, up, 2), _published(small, "up.bias") / outer, rtol=2**-22)
    np.testing.assert_allclose(_payload(small, _linear(network, "gate")), _published(small, "gate.weight") * inner)


def test_a_packed_activation_divides_its_second_half_of_rows(small, context_for, evaluate) -> None:
    network, data = _mlp(small), _data()
    ranges = _measured(small, network, evaluate, data)
    (expected,) = evaluate(small, network, data)
    context = context_for(quantization=SQ)
    context.ranges.update(ranges)
    assert PackGateUp().run(network, context) == 1
    assert SmoothActivations().run(network, context) == 2
    (actual,) = evaluate(small, network, data)
    np.testing.assert_allclose(actual, expected, atol=WIDTH * 2**-23 * np.abs(expected).max())
    packed = _linear(network, "gate_up_proj")
    outer = divisors_of(_linear(network, "down").inputs[1].const_value.recipe)
    rows = np.abs(_payload(small, packed)).max(axis=1) / np.abs(_packed(small, packed)).max(axis=1)
    np.testing.assert_allclose(rows[:WIDTH], 1, rtol=2**-20)
    np.testing.assert_allclose(rows[WIDTH:], 1 / outer, rtol=2**-20)


def _packed(small, node):
    """The packed weight, its columns multiplied as the pass did."""
    both = np.concatenate([_published(small, f"{name}.weight") for name in ("gate", "up")])
    return both * divisors_of(node.inputs[1].const_value.recipe)


@pytest.mark.parametrize(("kind", "divides"), [("relu", False), ("gelu", True)])
def test_a_relu_lets_factors_pass_and_a_gelu_does_not(small, context_for, evaluate, kind, divides) -> None:
    network, data = _mlp(small, kind, gated=False), _data()
    (expected,) = evaluate(small, network, data)
    context = context_for(quantization=SQ)
    context.ranges.update(_measured(small, network, evaluate, data))
    assert SmoothActivations().run(network, context) == 2
    (actual,) = evaluate(small, network, data)
    np.testing.assert_allclose(actual, expected, atol=WIDTH * 2**-23 * np.abs(expected).max())
    assert any(node.op_type == "Mul" for node in network.graph) == divides
    assert context.notes == (["down divides activations at run time to smooth them"] if divides else [])


def test_inputs_that_another_node_reads_are_divided_at_run_time(small, context_for, evaluate) -> None:
    network, data = _mlp(small), _data()
    context = context_for(quantization=SQ)
    context.ranges.update(_measured(small, network, evaluate, data))
    norm = _linear(network, "norm")
    small.b.output(small.b.op("Identity", [norm.outputs[0]], name="copy"), "z")
    expected = evaluate(small, network, data)
    assert SmoothActivations().run(network, context) == 2
    for actual, wanted in zip(evaluate(small, network, data), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, atol=WIDTH * 2**-23 * np.abs(wanted).max())
    assert context.notes == ["gate, up divide activations at run time to smooth them"]
    assert any("copy reads its inputs too" in miss.reason for miss in context.near_misses)
    np.testing.assert_array_equal(_payload(small, norm), _published(small, "norm"))


def test_layers_kept_out_read_what_they_read_before(small, context_for, evaluate) -> None:
    network, data = _mlp(small), _data()
    context = context_for(quantization=SQ, exclude_modules=("gate",))
    context.ranges.update(_measured(small, network, evaluate, data))
    (expected,) = evaluate(small, network, data)
    assert SmoothActivations().run(network, context) == 2
    np.testing.assert_array_equal(_payload(small, _linear(network, "gate")), _published(small, "gate.weight"))
    (actual,) = evaluate(small, network, data)
    np.testing.assert_allclose(actual, expected, atol=WIDTH * 2**-23 * np.abs(expected).max())


@pytest.mark.parametrize("scheme", ["W8A8", "FP8", None])
def test_schemes_without_smoothing_and_plans_without_ranges_change_nothing(small, context_for, scheme) -> None:
    network = _mlp(small)
    assert SmoothActivations().run(network, context_for(quantization=scheme)) == 0
    assert SmoothActivations().run(network, context_for(quantization=SQ)) == 0


@pytest.mark.parametrize("outliers", ["norm", "up.weight"])
@pytest.mark.parametrize(("smooth", "plain"), [(SQ, "W8A8"), ("W8A8_SQ_PER_CHANNEL", None)])
def test_channels_that_stand_out_cost_less_when_they_are_smoothed(
    small, context_for, evaluate, outliers, smooth, plain
) -> None:
    """Two channels 60 times the others, which read weights as small: rounded by their scale, the others lose 6 bits."""
    network, data = _mlp(small), _data()
    _plant(small, outliers, np.s_[[3, 40]], 60)
    for reader in ("gate.weight", "up.weight") if outliers == "norm" else ("down.weight",):
        _plant(small, reader, np.s_[:, [3, 40]], 1 / 60)
    (expected,) = evaluate(small, network, data)
    ranges = _measured(small, network, evaluate, data)

    def error(scheme, *, smooths):
        copy = _mlp(type(small)())  # the same seed, so the same names and shapes; payloads come from `small`
        context = context_for(quantization=scheme)
        context.ranges.update(ranges)
        if smooths:
            assert SmoothActivations().run(copy, context) == 2
        assert QuantizeScaled().run(copy, context) == 3
        (actual,) = evaluate(small, copy, data)
        return np.sqrt(np.mean((actual - expected) ** 2))

    rough = error(plain, smooths=False) if plain else error(smooth, smooths=False)
    assert error(smooth, smooths=True) < rough / 2
