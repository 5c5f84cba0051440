"""What is emitted for TensorRT 8.6 uses the names that it has, obeys its ranks and types, and computes the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm.compiler import pipeline
from trtllm.compiler.engine import ENGINE, open_engine
from trtllm.compiler.models.table import ARCHITECTURES
from trtllm.compiler.pipeline import build_engine, finish_build, prepare_build, read_model
from trtllm.compiler.targets.tensorrt.package import finish_package, open_package
from trtllm.config import build_config
from trtllm.errors import TargetError, UsageError
from trtllm.progress import Silent

from . import test_tensorrt_graphs

ENCODERS = ("Bert", "Roberta", "XLMRoberta", "DistilBert")
DECODERS = [name for name in ARCHITECTURES if not name.startswith(ENCODERS)]
TOLERANCE = 2e-4
"""Of float32 logits of size 1 to 10 after two layers."""
BLOCK_TOKENS = 8
RUNS = ((2, 5, 1), (3, 4, 3))
"""Rows, new tokens and table columns."""


def _feeds(settings: dict[str, Any], texts: list[list[np.ndarray]]) -> Any:
    """Inputs of two prompts' steps: nothing is in the cache, whose blocks hold anything finite."""
    random = np.random.default_rng(0)
    half = settings["dtype"] == "float16"

    def feed(name: str, run: int) -> np.ndarray:
        rows, tokens, columns = RUNS[run]
        if name == "input_ids":
            ids = np.zeros((rows, tokens), np.int32)
            for row, text in enumerate(texts[run]):
                ids[row, : len(text)] = text
            return ids
        if name == "lengths":
            return np.asarray([len(text) for text in texts[run]], np.int32)
        if name == "past_lengths":
            return np.zeros(rows, np.int32)
        if name == "block_table":
            return random.integers(0, settings["tensorrt_cache_blocks"], (rows, columns)).astype(np.int32)
        shape = (settings["tensorrt_cache_blocks"], *settings["cache_shapes"][name])
        return random.normal(0, 10, shape).astype(np.float16 if half else np.float32)

    return feed


def _texts() -> list[list[np.ndarray]]:
    random = np.random.default_rng(1)
    return [[random.integers(3, 128, tokens - row % 2) for row in range(rows)] for rows, tokens, _ in RUNS]


def _emit(fake: Any, model: Any, folder: Path, **options: Any) -> list[list[np.ndarray]]:
    """Builds the model with the stand-in; returns the rows of each run."""
    settings = {
        "target": "tensorrt", "tensorrt_version": "8.6", "dtype": "float32", "max_seq_len": 48, "max_batch_size": 3,
        "tensorrt_tokens_per_block": BLOCK_TOKENS, "tensorrt_cache_blocks": 5, **options,
    }  # fmt: skip
    build = build_config(settings)
    prepared = prepare_build(model, build, folder / "engine")
    shapes = {
        value.name: tuple(value.shape)[1:]
        for value in prepared.compiled.network.graph.inputs
        if (value.name or "").startswith(("past_key", "past_value"))
    }
    texts = _texts()
    fake.feed(_feeds({**settings, "cache_shapes": shapes}, texts))
    finish_build(prepared, folder / "engine")
    return texts


def _reference(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids[None])).logits[0].float().numpy()


@pytest.mark.parametrize("architecture", DECODERS)
def test_the_layers_of_a_decoder_compute_its_logits(tensorrt_86, tiny_model, tmp_path, architecture) -> None:
    model = tiny_model(architecture)
    texts = _emit(tensorrt_86, model, tmp_path)
    for run, rows in enumerate(texts):
        results = tensorrt_86.results(run)
        for row, text in enumerate(rows):
            expected = _reference(model, text)[-1]
            np.testing.assert_allclose(results["logits"][row], expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert results["candidate_indices"].dtype == np.int32
        assert results["present_key.1"].shape[:2] == RUNS[run][:2]


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name.startswith(ENCODERS)])
@pytest.mark.parametrize("pooling", ["none", "mean", "cls", "last"])
def test_the_layers_of_an_encoder_compute_its_states(tensorrt_86, tiny_model, tmp_path, architecture, pooling) -> None:
    import torch

    model = tiny_model(architecture)
    texts = _emit(tensorrt_86, model, tmp_path, pooling=pooling)
    (name,) = tensorrt_86.results(0)
    for run, rows in enumerate(texts):
        found = tensorrt_86.results(run)[name]
        for row, text in enumerate(rows):
            with torch.no_grad():
                states = model(torch.tensor(text[None])).last_hidden_state[0].numpy()
            expected = {"none": states, "mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
            own = found[row, : len(text)] if pooling == "none" else found[row]
            np.testing.assert_allclose(own, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_halves_stay_near_and_what_must_be_float_is_held(tensorrt_86, tiny_model, tmp_path) -> None:
    model = tiny_model("LlamaForCausalLM")
    texts = _emit(tensorrt_86, model, tmp_path, dtype="float16")
    assert {"FP16", "OBEY_PRECISION_CONSTRAINTS", "REFIT"} <= tensorrt_86.last("config")._set
    for row, text in enumerate(texts[0]):
        expected = _reference(model, text)[-1]
        assert np.abs(tensorrt_86.results(0)["logits"][row] - expected).max() < 2e-2 * np.abs(expected).max()
    network = tensorrt_86.last("network")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    held = [layer for layer in layers if "precision" in layer.__dict__]
    assert {"EXP", "SQRT"} <= {layer._operation.name for layer in held if hasattr(layer, "_operation")} & {
        "EXP",
        "SQRT",
    }
    assert all(layer.precision is tensorrt_86.DataType.FLOAT for layer in held)
    assert not any(layer.type is tensorrt_86.LayerType.MATRIX_MULTIPLY and "Linear" in layer.name for layer in held)


def _logits_of_the_scheme(model: Any, texts: list[np.ndarray], monkeypatch: Any, **options: Any) -> list[np.ndarray]:
    """The last logits of each row by the graph of another version, whose products are spelled out in onnxruntime."""
    with monkeypatch.context() as patch:
        patch.setattr(test_tensorrt_graphs, "PROMPT_LENGTHS", np.array([len(text) for text in texts]))
        graph = test_tensorrt_graphs.Graph(model, tensorrt_version="rtx-1.7", **options)
        padded = np.zeros((len(texts), max(map(len, texts))), np.int64)
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text
        logits = graph.step(padded, np.zeros(len(texts), np.int64), np.array([len(text) for text in texts]))
    return list(logits[:, 0])


@pytest.mark.parametrize("quantization", ["W8A16", "W4A16"])
def test_blocks_of_integers_become_the_constants_that_they_stand_for(
    tensorrt_86, tiny_model, tmp_path, monkeypatch, quantization
) -> None:
    model = tiny_model("LlamaForCausalLM")
    expected = [_logits_of_the_scheme(model, rows, monkeypatch, quantization=quantization) for rows in _texts()]
    texts = _emit(tensorrt_86, model, tmp_path, quantization=quantization)
    for run, rows in enumerate(texts):
        for row in range(len(rows)):
            found = tensorrt_86.results(run)["logits"][row]
            np.testing.assert_allclose(found, expected[run][row], atol=TOLERANCE, rtol=TOLERANCE)
    assert np.abs(expected[0][0] - _reference(model, texts[0][0])[-1]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("quantization", ["W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN"])
def test_products_of_int8_are_rounded_by_the_engine(
    tensorrt_86, tiny_model, tmp_path, monkeypatch, quantization, dtype
) -> None:
    model = tiny_model("LlamaForCausalLM")
    checkpoint = read_model(model, progress=Silent())
    tokens = np.random.default_rng(7).integers(3, 128, (4, 16))
    settings = build_config({"target": "tensorrt", "quantization": quantization, "max_seq_len": 48})
    calibration = pipeline.calibrated(checkpoint, settings, Silent(), tokens=tokens)
    monkeypatch.setattr(pipeline, "calibrated", lambda *_, **__: calibration)
    texts = _emit(tensorrt_86, model, tmp_path, quantization=quantization, dtype=dtype)
    assert "INT8" in tensorrt_86.last("config")._set
    network = tensorrt_86.last("network")
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    rounding = [layer for layer in layers if layer.type is tensorrt_86.LayerType.QUANTIZE]
    products = [node for node in layers if node.type is tensorrt_86.LayerType.MATRIX_MULTIPLY and "scaled" in node.name]
    assert len(rounding) == 2 * len(products) == 2 * 2 * 4  # q, k and v are packed, and so are gate and up
    assert not any("precision" in layer.__dict__ for layer in rounding)
    for row, text in enumerate(texts[0]):
        expected = _reference(model, text)[-1]
        error = np.abs(tensorrt_86.results(0)["logits"][row] - expected).max() / np.abs(expected).max()
        assert 1e-4 < error < 0.1


def test_every_weight_has_its_name_and_a_plan_its_profiles(tensorrt_86, tiny_model, tmp_path) -> None:
    _emit(
        tensorrt_86, tiny_model("LlamaForCausalLM"), tmp_path, tensorrt_decode_batches=(1,),
        tensorrt_prefill_lengths=(4, 16), tensorrt_table_lengths=(16,), tensorrt_workspace_mb=64,
    )  # fmt: skip
    engine = open_engine(tmp_path / "engine")
    assert (engine.path / ENGINE).read_bytes().startswith(b"plan of")
    assert tensorrt_86.last("config")._limits == {"WORKSPACE": 64 << 20}
    assert set(tensorrt_86.last("network")._weight_names) == {weight.name for weight in engine.manifest.weights}
    found = [
        (entry.name, entry.batch[1], entry.sequence[1], entry.columns[1]) for entry in engine.manifest.target.profiles
    ]
    assert found == [
        ("generation", 1, 1, 2), ("generation", 1, 1, 6), ("generation", 3, 1, 2), ("generation", 3, 1, 6),
        ("context", 1, 4, 1), ("context", 1, 4, 6), ("context", 1, 16, 1), ("context", 1, 16, 6),
    ]  # fmt: skip
    shapes = [profile._shapes for profile in tensorrt_86.last("config")._profiles]
    assert all(least == expected == most for profile in shapes for least, expected, most in profile.values())
    assert shapes[3]["block_table"][0] == (3, 6) and "past_key.0" not in shapes[3]


def test_a_network_is_finished_where_the_model_is_not(tensorrt_86, tiny_model, tmp_path) -> None:
    model = tiny_model("LlamaForCausalLM")
    texts = _emit(tensorrt_86, model, tmp_path)
    whole = tensorrt_86.results(0)["logits"]
    settings = {
        "target": "tensorrt", "tensorrt_version": "8.6", "dtype": "float32", "max_seq_len": 48, "max_batch_size": 3,
        "tensorrt_tokens_per_block": BLOCK_TOKENS, "tensorrt_cache_blocks": 5,
    }  # fmt: skip
    prepared = prepare_build(model, build_config(settings), tmp_path / "network", emits_network=True)
    written = finish_build(prepared, tmp_path / "network")
    assert written.manifest.target.flavour == "network" and not (written.path / ENGINE).exists()
    package = open_package(tmp_path / "network")
    engine = finish_package(package, tmp_path / "finished", changes={"tensorrt_decode_batches": (2,)})
    np.testing.assert_array_equal(tensorrt_86.results(0)["logits"], whole)
    assert len(texts) and {entry.batch[0] for entry in engine.manifest.target.profiles} == {1, 2, 3}
    direct = open_engine(tmp_path / "engine").manifest
    assert engine.manifest.network_hash == direct.network_hash
    assert {(w.name, w.sha256) for w in engine.manifest.weights} == {(w.name, w.sha256) for w in direct.weights}
    assert not (engine.path / "network.weights").exists() and (engine.path / "network.onnx").exists()
    with pytest.raises(UsageError, match="max_seq_len cannot change"):
        finish_package(package, tmp_path / "other", changes={"max_seq_len": 64})
    with pytest.raises(UsageError, match="is a finished engine"):
        open_package(engine.path)


def test_a_graph_for_another_release_is_refused(tensorrt_86, tiny_model, tmp_path) -> None:
    settings = build_config({"target": "tensorrt", "tensorrt_version": "10.4", "max_seq_len": 48})
    with pytest.raises(TargetError, match=r"the graph is for TensorRT 10\.0 to 10\.14, tensorrt 8\.6\.0 is installed"):
        build_engine(tiny_model("LlamaForCausalLM"), tmp_path / "engine", settings)
    assert not (tmp_path / "engine").exists()


def test_integers_inside_the_library_are_int32(tensorrt_86, tiny_model, tmp_path) -> None:
    _emit(tensorrt_86, tiny_model("Qwen3MoeForCausalLM"), tmp_path)
    network = tensorrt_86.last("network")
    kinds = {
        network.get_layer(index).get_output(output).dtype.name
        for index in range(network.num_layers)
        for output in range(network.get_layer(index).num_outputs)
    }
    assert kinds <= {"FLOAT", "INT32", "BOOL"}
