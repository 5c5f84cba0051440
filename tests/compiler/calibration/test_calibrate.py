"""Calibrated layers err less than plainly rounded ones, and a killed calibration goes on to the same bytes."""

import numpy as np
import pytest

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.quantize import QuantizedBlocks, dequantize_blocks, quantize_blocks
from trtllm.compiler.calibration import calibrate as calibration
from trtllm.compiler.calibration.calibrate import calibrate
from trtllm.compiler.calibration.dataset import calibration_tokens
from trtllm.compiler.calibration.segment_rounding import CalibrationSettings, weight_source
from trtllm.compiler.calibration.segments import segment_feeds, segments, subgraph
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.table import builder_for
from trtllm.compiler.targets.onnxruntime.graph_session import GraphSession
from trtllm.config import build_config
from trtllm.dtypes import DType
from trtllm.progress import Silent

LENGTH = 64


def network_of(checkpoint):
    build = build_config({"max_seq_len": LENGTH, "max_input_len": LENGTH})
    return builder_for(checkpoint)(ModelBuilder(checkpoint, build, DType.FLOAT32))


def all_bits(network, bits=4):
    return {weight_source(linear).name: bits for part in segments(network) for linear in part.linears}


def run(checkpoint, tokens, folder, **settings):
    network = network_of(checkpoint)
    wanted = CalibrationSettings(**{"bits": all_bits(network), **settings})
    return calibrate(network, RecipeReader(checkpoint.tensors), tokens, wanted, folder, Silent())


@pytest.fixture
def tokens(checkpoint, text_file):
    return calibration_tokens(checkpoint, str(text_file), 32, LENGTH)


def test_segments_hold_every_layer_once_and_chain_through_their_states(checkpoint) -> None:
    parts = segments(network_of(checkpoint))
    assert len(parts) == 4  # attention and feed-forward of two layers
    assert [part.entry for part in parts[1:]] == [part.exit for part in parts[:-1]]
    names = [weight_source(linear).name for part in parts for linear in part.linears]
    assert len(names) == len(set(names)) == 14


def test_segments_one_after_the_other_compute_what_the_whole_graph_does(checkpoint, tokens) -> None:
    network = network_of(checkpoint)
    reader = RecipeReader(checkpoint.tensors)
    parts, states = segments(network), None
    for part in parts:
        graph, weights = subgraph(network, part, [part.exit])
        payloads = {name: reader.read(weight.recipe) for name, weight in weights.items()}
        (states,) = GraphSession(graph).run(
            segment_feeds(network, part, tokens[:2], states) | payloads, [part.exit.name]
        )
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(checkpoint.source)
    seen = []
    model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().numpy()))
    with torch.no_grad():
        model(torch.from_numpy(tokens[:2]))
    # float32 through two layers whose sums have at most 96 terms, in units of the largest state
    np.testing.assert_allclose(states, seen[0], atol=2 * 96 * 6e-8 * np.abs(seen[0]).max() * 4)


def inputs_of(checkpoint, tokens):
    """What flows into each linear of the first segment's norm, in full precision: float64 [T, K] by weight."""
    network, reader = network_of(checkpoint), RecipeReader(checkpoint.tensors)
    part = segments(network)[0]
    values = {linear.inputs[0]: None for linear in part.linears}
    graph, weights = subgraph(network, part, list(values))
    payloads = {name: reader.read(weight.recipe) for name, weight in weights.items()}
    names = [value.name for value in values]
    found = dict(
        zip(names, GraphSession(graph).run(segment_feeds(network, part, tokens, None) | payloads, names), strict=True)
    )
    return {
        weight_source(linear).name: found[linear.inputs[0].name].reshape(-1, 64).astype(np.float64)
        for linear in part.linears
    }


def test_gptq_errs_less_than_rounding_on_the_calibration_text(checkpoint, tokens, tmp_path) -> None:
    made = run(checkpoint, tokens, tmp_path)
    for name, x in inputs_of(checkpoint, tokens).items():
        weight = checkpoint.tensors[name].read().astype(np.float32)
        plain = dequantize_blocks(quantize_blocks(weight, 4, 32, "float16"), 4)
        values, scales = (
            made.tensors[name + ".quantized_values"].read(),
            made.tensors[name + ".quantized_scales"].read(),
        )
        chosen = dequantize_blocks(QuantizedBlocks(values, scales), 4)
        error, plain_error = (np.square(x @ (matrix - weight).T).sum() for matrix in (chosen, plain))
        assert error < plain_error, name


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_killed_calibration_goes_on_to_the_same_bytes(checkpoint, tokens, tmp_path, monkeypatch, stop_after) -> None:
    run(checkpoint, tokens, tmp_path / "whole")
    original, calls = calibration._Run._quantized, []

    def dies(self, *arguments):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(arguments[0])
        return original(self, *arguments)

    monkeypatch.setattr(calibration._Run, "_quantized", dies)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tokens, tmp_path / "killed")

    def counts(self, *arguments):
        calls.append(arguments[0])
        return original(self, *arguments)

    monkeypatch.setattr(calibration._Run, "_quantized", counts)
    run(checkpoint, tokens, tmp_path / "killed")
    assert calls == [0, 1, 2, 3]  # nothing was done twice
    whole, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
        for name in ("whole", "killed")
    )
    assert whole == resumed and len(whole) == 4


def test_another_text_or_setting_takes_nothing_up(checkpoint, tokens, tmp_path) -> None:
    run(checkpoint, tokens, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    run(checkpoint, tokens[:16], tmp_path)
    assert all(path.read_bytes() != content for path, content in before.items())


def test_states_of_finished_segments_are_removed(checkpoint, tokens, tmp_path) -> None:
    run(checkpoint, tokens, tmp_path)
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".*"))


def test_layers_may_see_what_full_layers_make_of_the_text(checkpoint, tokens, tmp_path) -> None:
    quantized = run(checkpoint, tokens, tmp_path / "a").tensors
    full = run(checkpoint, tokens, tmp_path / "b", flows_quantized=False).tensors
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
    assert (quantized[first + ".quantized_values"].read() == full[first + ".quantized_values"].read()).all()
    assert (quantized[last + ".quantized_values"].read() != full[last + ".quantized_values"].read()).any()


def test_awq_errs_less_than_rounding_on_the_calibration_text(checkpoint, tokens, tmp_path) -> None:
    made = run(checkpoint, tokens, tmp_path, method="awq")
    norm = "model.layers.0.input_layernorm.weight"
    published = checkpoint.tensors[norm].read().astype(np.float32)
    scales = published / made.tensors[norm + ".rescaled"].read()
    assert scales.min() < scales.max()  # some scaling was found to help
    for name, x in inputs_of(checkpoint, tokens).items():
        if "o_proj" in name:
            continue
        weight = checkpoint.tensors[name].read().astype(np.float32)
        plain = dequantize_blocks(quantize_blocks(weight, 4, 32, "float16"), 4)
        values, steps = (made.tensors[f"{name}.quantized_{part}"].read() for part in ("values", "scales"))
        chosen = dequantize_blocks(QuantizedBlocks(values, steps), 4)
        error = np.square((x / scales) @ chosen.T - x @ weight.T).sum()
        assert error < np.square(x @ (plain - weight).T).sum(), name
