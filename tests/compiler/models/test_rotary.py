"""Rotary frequencies, factors and tables equal those of transformers for every scaling; bad parameters are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from trtllm.compiler.models.model_config import ModelConfig
from trtllm.compiler.models.rotary import (
    RotaryConfig,
    attention_factor,
    longrope_frequencies,
    rotary_config,
    rotary_tables,
    static_frequencies,
)
from trtllm.errors import BadInputError, UnsupportedModelError

HEAD = 16
RELATIVE = 8 * float(np.finfo(np.float32).eps)
"""A power, a product and a quotient in float32, and a power function that may be off by a few last places."""
SHORT, LONG = [1.0 + 0.1 * i for i in range(HEAD // 2)], [1.0 + 2.0 * i for i in range(HEAD // 2)]
ORIGINAL = {"original_max_position_embeddings": 32}

STATIC = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 2.5, "rope_theta": 500000.0},
    {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    {"rope_type": "yarn", "factor": 40.0, "rope_theta": 1e6, "beta_fast": 16, "beta_slow": 2, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25, **ORIGINAL},
    {"rope_type": "yarn", "factor": None, **ORIGINAL},
    {"rope_type": "yarn", "factor": 0.5, **ORIGINAL},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.5, "high_freq_factor": 2.0, "rope_theta": 5e5},
]
LONGROPE = [
    {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, **ORIGINAL},
    {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 8.0, **ORIGINAL},
    {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "attention_factor": 1.5, **ORIGINAL},
    {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG},
]


def ours(parameters: dict[str, Any], **config: Any) -> RotaryConfig:
    values = {"max_position_embeddings": 128, "rope_parameters": dict(parameters), **config}
    return rotary_config(ModelConfig(values, "the test"), HEAD)


def theirs(parameters: dict[str, Any], length: int | None = None) -> tuple[np.ndarray, float]:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * HEAD, num_attention_heads=4, max_position_embeddings=128, rope_parameters=dict(parameters)
    )
    seq_len = None if length is None else torch.tensor(length)
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=seq_len)
    return frequencies.numpy(), float(factor)


@pytest.mark.parametrize("parameters", STATIC, ids=lambda p: f"{p['rope_type']}-{STATIC.index(p)}")
def test_frequencies_of_a_scaling_that_knows_no_length_equal_those_of_transformers(parameters: dict[str, Any]) -> None:
    frequencies, factor = theirs(parameters)
    np.testing.assert_allclose(static_frequencies(ours(parameters)), frequencies, rtol=RELATIVE)
    assert attention_factor(ours(parameters)) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("parameters", LONGROPE, ids=lambda p: f"longrope-{LONGROPE.index(p)}")
def test_both_longrope_tables_equal_those_of_transformers(parameters: dict[str, Any]) -> None:
    short, long = longrope_frequencies(ours(parameters))
    np.testing.assert_allclose(short, theirs(parameters, 1)[0], rtol=RELATIVE)
    np.testing.assert_allclose(long, theirs(parameters, 129)[0], rtol=RELATIVE)
    assert attention_factor(ours(parameters)) == pytest.approx(theirs(parameters)[1], rel=1e-12)


@pytest.mark.parametrize(("theta", "factor"), [(1e4, 2.0), (5e5, 8.0)])
@pytest.mark.parametrize("length", [1, 128, 129, 200, 1000])
def test_dynamic_frequencies_of_a_row_equal_those_of_transformers(theta: float, factor: float, length: int) -> None:
    parameters = {"rope_type": "dynamic", "factor": factor, "rope_theta": theta}
    wanted, scale = theirs(parameters, length)
    cosines, sines = dynamic_tables(ours(parameters), length)
    angle = (length - 1) * wanted.astype(np.float64)
    # An angle of n radians in float32 is off by n eps; so is its cosine.
    allowed = RELATIVE * np.maximum(np.abs(angle), 1.0)
    assert scale == 1.0
    assert (np.abs(cosines - np.cos(angle)) <= allowed).all()
    assert (np.abs(sines - np.sin(angle)) <= allowed).all()


def dynamic_tables(config: RotaryConfig, length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the last position of a row of `length`, by the graph that the config becomes."""
    import onnx_ir as ir
    import onnxruntime

    from trtllm.compiler.ir.builder import OPSET, GraphBuilder
    from trtllm.compiler.models.rotary import Rotary
    from trtllm.dtypes import DType

    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name="rotary")
    b = GraphBuilder(graph)
    positions = b.input("positions", DType.INT64, (1, 1))
    lengths, past = b.input("lengths", DType.INT64, (1,)), b.input("past", DType.INT64, (1,))
    cos, sin = Rotary(b, config, name="rotary", capacity=8).cos_sin(positions, lengths, past)
    b.output(cos, "cos")
    b.output(sin, "sin")
    session = onnxruntime.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString())
    feeds = {"positions": [[length - 1]], "lengths": [1], "past": [length - 1]}
    results = session.run(None, {name: np.array(value, np.int64) for name, value in feeds.items()})
    return results[0][0, 0], results[1][0, 0]


def test_tables_are_cosines_and_sines_of_position_times_frequency_times_the_factor() -> None:
    config = ours({"rope_type": "yarn", "factor": 4.0, **ORIGINAL})
    cos, sin = rotary_tables(config, 50)
    angles = np.outer(np.arange(50), static_frequencies(config).astype(np.float64))
    factor = 0.1 * math.log(4.0) + 1.0
    np.testing.assert_allclose(cos, np.cos(angles) * factor, atol=50 * RELATIVE)
    np.testing.assert_allclose(sin, np.sin(angles) * factor, atol=50 * RELATIVE)


def test_keys_of_configs_before_transformers_5_mean_the_same() -> None:
    values = {"max_position_embeddings": 128, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    old = rotary_config(ModelConfig(values, "the test"), HEAD)
    new = ours({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert (old.kind, old.theta) == (new.kind, new.theta) == ("linear", 5e5)
    np.testing.assert_array_equal(static_frequencies(old), static_frequencies(new))


def test_the_original_length_beside_the_parameters_wins_as_in_transformers() -> None:
    parameters = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, **ORIGINAL}
    beside = ours(parameters, original_max_position_embeddings=64)
    assert beside.parameters["original_max_position_embeddings"] == 64


@pytest.mark.parametrize(
    ("parameters", "missing"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "dynamic", "factor": None}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "high_freq_factor"),
        ({"rope_type": "longrope", "short_factor": SHORT}, "long_factor"),
    ],
)
def test_a_missing_parameter_is_named(parameters: dict[str, Any], missing: str) -> None:
    with pytest.raises(BadInputError, match=f"'{parameters['rope_type']}', which lacks {missing}"):
        ours(parameters)


def test_a_parameter_that_is_no_number_is_named() -> None:
    with pytest.raises(BadInputError, match="factor = 'four'"):
        ours({"rope_type": "linear", "factor": "four"})


def test_a_longrope_table_of_another_size_is_refused() -> None:
    config = ours({"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG[:-1], **ORIGINAL})
    with pytest.raises(BadInputError, match="long_factor has 7 entries, the rotary size wants 8"):
        longrope_frequencies(config)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "linaer", "factor": 2.0}, "'linaer' \\(did you mean 'linear'\\?\\)"),
        ({"rope_type": "proportional"}, "'proportional'"),
        ({"rope_type": "mrope", "mrope_section": [2, 3, 3]}, "'mrope'"),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, "mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"full_attention": {"rope_type": "default"}}, "per layer type"),
    ],
)
def test_what_no_formula_covers_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ours(parameters)


def test_an_odd_number_of_rotated_elements_is_refused() -> None:
    values = {"max_position_embeddings": 128, "rope_parameters": {"partial_rotary_factor": 0.2}}
    with pytest.raises(UnsupportedModelError, match="3 of 16 head elements"):
        rotary_config(ModelConfig(values, "the test"), HEAD, partial=True)
