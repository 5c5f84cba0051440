"""Smoothing without rounding leaves the logits of every family as they are, and says which products divide inputs."""

from typing import Any

import numpy as np
import pytest

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.calibration.activation_ranges import activation_ranges
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import Weight, weight_of
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.table import builder_for
from trtllm.compiler.targets.onnxruntime.capabilities import CAPABILITIES
from trtllm.compiler.targets.onnxruntime.graph_session import GraphSession
from trtllm.config import BuildConfig
from trtllm.dtypes import DType
from trtllm.frontends.in_memory import read_model
from trtllm.passes.base import ChannelRanges, PassContext
from trtllm.passes.quantize_scaled import divisors_of
from trtllm.passes.smooth import SmoothActivations
from trtllm.progress import Silent

LENGTH = 24
TOKENS = np.random.default_rng(5).integers(0, 128, (2, LENGTH))
AT_RUN_TIME = {"GPT2LMHeadModel": "mlp.c_proj"}
"""By architecture: whose inputs nothing before can take the division of (GELU is not homogeneous)."""


def _network(model: Any) -> tuple[Network, RecipeReader]:
    checkpoint = read_model(model)
    build = BuildConfig(max_seq_len=LENGTH, max_input_len=LENGTH, max_batch_size=2)
    return builder_for(checkpoint)(ModelBuilder(checkpoint, build, DType.FLOAT32)), RecipeReader(checkpoint.tensors)


def _logits(network: Network, reader: RecipeReader) -> np.ndarray:
    feeds = {"input_ids": TOKENS, "past_lengths": np.zeros(2, np.int64), "lengths": np.full(2, LENGTH)}
    for index, layer in enumerate(network.info.cache):
        empty = np.zeros((2, layer.num_kv_heads, LENGTH, layer.head_size), np.float32)
        feeds |= {f"past_key.{index}": empty, f"past_value.{index}": empty}
    for value in network.graph.initializers.values():
        if isinstance(value.const_value, Weight):
            value.const_value.bind(reader)
    (logits,) = GraphSession(network).run(feeds, ["logits"])
    return logits


def _smooth(network: Network, ranges: dict[str, ChannelRanges]) -> PassContext:
    build = BuildConfig(quantization="W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN")
    context = PassContext(build, CAPABILITIES, ranges=ranges)
    assert SmoothActivations().run(network, context) > 0
    return context


def test_smoothing_alone_leaves_the_logits_as_they_are(variant: Any, model: Any) -> None:
    network, reader = _network(model)
    expected = _logits(network, reader)
    network, reader = _network(model)
    measured = activation_ranges(network, reader, TOKENS, Silent())
    # factors far from 1, and different in each channel: those measured alone may hardly differ
    random = np.random.default_rng(1)
    ranges = {
        name: ChannelRanges(item.inputs * np.exp(2 * random.normal(size=len(item.inputs))), item.weights)
        for name, item in measured.items()
    }
    context = _smooth(network, ranges)
    actual = _logits(network, reader)
    # float32 rounding as in the parity test: eps * sqrt(hidden) for each of 7 products a layer and the head, relative
    # to the largest logit. Either computation has it once, and a smoothed product rounds each term three times instead
    # of once (its input, its weight, their product): sqrt(3) + 1 times.
    products = 7 * network.info.num_layers + 1
    bound = np.finfo(np.float32).eps * np.sqrt(network.info.hidden_size) * products * np.abs(expected).max()
    assert np.abs(actual - expected).max() <= (np.sqrt(3) + 1) * bound
    _check_notes(variant, context)


def _check_notes(variant: Any, context: PassContext) -> None:
    """Exactly the products that nothing else helps divide their inputs at run time."""
    late = AT_RUN_TIME.get(variant.architecture)
    (notes,) = context.notes or [""]
    names = notes.removesuffix(" divide activations at run time to smooth them").split(", ") if notes else []
    assert all(late is not None and name.endswith(late) for name in names)
    assert bool(names) == (late is not None)


def test_every_linear_layer_is_smoothed_but_routers_and_experts(variant: Any, model: Any) -> None:
    network, reader = _network(model)
    _smooth(network, activation_ranges(network, reader, TOKENS, Silent()))
    for node in network.graph:
        weight = weight_of(node.inputs[1]) if is_dialect(node, "Linear") else None
        if weight is not None:
            routes = any(is_dialect(use.node, "MoE") for use in node.outputs[0].uses())
            assert (divisors_of(weight.recipe) is None) == routes


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_query_heads_of_a_key_value_head_share_factors(variants: Any, tiny_model: Any, name: str) -> None:
    model = tiny_model(variants[name])
    network, reader = _network(model)
    _smooth(network, activation_ranges(network, reader, TOKENS, Silent()))
    attention = next(node for node in network.graph if is_dialect(node, "Attention"))
    output = next(iter(attention.outputs[0].uses())).node
    weight = weight_of(output.inputs[1])
    factors = divisors_of(weight.recipe) if weight is not None else None
    heads, shared = (attention.attributes[key].value for key in ("num_heads", "num_kv_heads"))
    assert factors is not None
    grid = factors.reshape(shared, heads // shared, -1)
    assert (grid == grid[:, :1]).all()
    assert len(np.unique(factors)) > 1
