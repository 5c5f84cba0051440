"""`trtllm-diff`: equal things are equal, and each kind of difference is found, measured and told by the exit code."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.quantize import dequantize_blocks, quantize_blocks, tile
from trtllm.compiler.engine import open_engine
from trtllm.compiler.inspection.payloads import engine_tensors, matrices, untiled_scales, untiled_values
from trtllm.compiler.pipeline import build_engine
from trtllm.compiler.refit.recipes import stored_recipes
from trtllm.config import build_config
from trtllm.frontends.detect import open_model
from trtllm.tools.commands.diff import main
from trtllm.tools.commands.prune import main as prune


def run(capsys, code, *arguments) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def copied(model: Path, folder: Path, changes: dict[str, np.ndarray | None]) -> Path:
    """A copy of a checkpoint with other tensors; None takes one out."""
    shutil.copytree(model, folder)
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: array for name, array in tensors.items() if array is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_checkpoint_equals_its_copy(tiny_checkpoint, tmp_path, capsys):
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    found = run(capsys, 0, tiny_checkpoint, tmp_path / "copy")
    assert found["equal"] and not found["tensors"]
    assert found["equal_tensors"] == len(open_model(tiny_checkpoint).tensors)


def test_each_kind_of_tensor_difference_is_told_apart(tiny_checkpoint, tmp_path, capsys):
    held = load_file(tiny_checkpoint / "model.safetensors")
    norm, gate = "model.norm.weight", "model.layers.0.mlp.gate_proj.weight"
    up, down = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    moved = held[gate].copy()
    moved[1, 2] += 0.5
    other = copied(
        tiny_checkpoint, tmp_path / "other",
        {norm: None, gate: moved, up: held[up].astype(np.float64), down: held[down][:-1], "extra": held[norm]},
    )  # fmt: skip
    found = run(capsys, 1, tiny_checkpoint, other)
    by_name = {item["name"]: item for item in found["tensors"]}
    assert {name: item["what"] for name, item in by_name.items()} == {
        norm: "only in A", "extra": "only in B", gate: "values", up: "dtype", down: "shape",
    }  # fmt: skip
    error = moved[1, 2].astype(np.float64) - held[gate][1, 2]
    energy = np.linalg.norm(held[gate].astype(np.float64))
    assert by_name[gate]["max_error"] == error
    assert by_name[gate]["relative_rms"] == pytest.approx(error / energy, rel=1e-12)
    assert (by_name[up]["max_error"], by_name[up]["relative_rms"]) == (0, 0)
    assert found["equal_tensors"] == len(held) - 4


def test_a_value_that_is_not_finite_is_an_infinite_error_in_legal_json(tiny_checkpoint, tmp_path, capsys):
    held = load_file(tiny_checkpoint / "model.safetensors")
    broken = held["model.norm.weight"].copy()
    broken[0] = np.nan
    other = copied(tiny_checkpoint, tmp_path / "other", {"model.norm.weight": broken})
    (item,) = run(capsys, 1, tiny_checkpoint, other)["tensors"]
    assert (item["max_error"], item["relative_rms"]) == ("inf", "inf")


def test_config_and_tokenizer_differences_are_named(tiny_checkpoint, tmp_path, capsys):
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    (other / "tokenizer_config.json").write_text("{}")
    found = run(capsys, 1, tiny_checkpoint, other)
    assert [item["key"] for item in found["config"]] == ["rope_theta"] and found["config"][0]["b"] == 5.0
    assert [item["key"] for item in found["files"]] == ["tokenizer_config.json"]


@pytest.mark.parametrize("level", [0, 2])
def test_engines_differ_by_what_their_quantized_weights_stand_for(tiny_checkpoint, tmp_path, capsys, level):
    held = load_file(tiny_checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    other = copied(tiny_checkpoint, tmp_path / "other", {name: held[name] * 2})
    options = build_config({"max_seq_len": 32, "quantization": "W4A16", "optimization_level": level})
    a = build_engine(tiny_checkpoint, tmp_path / "a", options)
    b = build_engine(other, tmp_path / "b", options)
    assert run(capsys, 0, a.path, a.path)["equal"]
    found = run(capsys, 1, a.path, b.path)
    assert not found["config"] and len(found["tensors"]) == 1  # 4-bit integers stay, the scales double
    assert "_scales" in found["tensors"][0]["name"]
    assert found["tensors"][0]["relative_rms"] == 1.0


@pytest.mark.parametrize("options", [{}, {"optimization_level": 0}, {"quantization": "W4A16"}, {"quantization": "FP8"}])
def test_an_engine_equals_the_checkpoint_that_its_recipes_make_it_of(tiny_checkpoint, tmp_path, capsys, options):
    held = load_file(tiny_checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    engine = build_engine(tiny_checkpoint, tmp_path / "engine", build_config({"max_seq_len": 32, **options}))
    found = run(capsys, 0, engine.path, tiny_checkpoint)
    assert found["equal_tensors"] == len(engine.manifest.weights) and found["kind"] == "engine and checkpoint"
    other = copied(tiny_checkpoint, tmp_path / "other", {name: held[name] * 2, "model.norm.weight": None})
    by_name = {item["name"]: item for item in run(capsys, 1, other, engine.path)["tensors"]}
    assert by_name.pop("model.norm.weight")["what"] == "only in B"
    assert by_name and all(item.startswith(name) for item in by_name)
    assert all(item["what"] == "values" for item in by_name.values())
    # of twice the values half are missing; the rounding of 4 bits comes on top
    (error,) = {round(item["relative_rms"], 1) for item in by_name.values() if item["relative_rms"] is not None}
    assert error == 0.5


@pytest.mark.parametrize("bits", [4, 8])
def test_untiling_reverses_tiling(bits):
    rng = np.random.default_rng(3)
    blocks = quantize_blocks(rng.standard_normal((37, 96)).astype(np.float32), bits, 32, "float16")
    integers = untiled_values(tile(blocks.values, bits, 3), bits)[:37]
    scales = untiled_scales(tile(blocks.scales, 16, 3))[:37]
    dense = integers.reshape(37, 3, 32).astype(np.float32) * scales[..., None].astype(np.float32)
    np.testing.assert_array_equal(dense.reshape(37, 96), dequantize_blocks(blocks, bits))


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
def test_an_engines_matrices_are_its_quantized_weights(tiny_checkpoint, tmp_path, level, scheme):
    options = build_config({"max_seq_len": 32, "quantization": scheme, "optimization_level": level})
    engine = build_engine(tiny_checkpoint, tmp_path / "engine", options)
    recipes, tensors = stored_recipes(engine), engine_tensors(engine)
    made = matrices(tensors, recipes)
    assert len(made) == sum(entry.quantization is not None for entry in engine.manifest.weights) // 2 > 0
    reader = RecipeReader(open_model(tiny_checkpoint).tensors)
    for name, tensor in made.items():
        full = reader.read(recipes[name].of.of)
        bits = recipes[name].of.dtype.bits
        expected = dequantize_blocks(quantize_blocks(np.ascontiguousarray(full), bits, 32, "float16"), bits)
        np.testing.assert_array_equal(tensor.read(), expected)
        np.testing.assert_array_equal(tensor.read(3, 21), expected[3:21])


def test_a_stripped_engine_has_the_weights_of_the_full_one_by_hash(tiny_checkpoint, tmp_path, capsys):
    engine = build_engine(tiny_checkpoint, tmp_path / "engine", build_config({"max_seq_len": 32}))
    assert prune([str(engine.path), "--output-dir", str(tmp_path / "stripped")]) == 0
    found = run(capsys, 1, engine.path, tmp_path / "stripped")
    assert [item["key"] for item in found["config"]] == ["stripped"] and not found["tensors"]
    assert found["config"][0]["b"] == list(open_engine(tmp_path / "stripped").manifest.stripped)


def test_a_pruned_checkpoint_has_the_tensors_of_the_full_one_by_hash(tiny_checkpoint, tmp_path, capsys):
    assert prune([str(tiny_checkpoint), "--output-dir", str(tmp_path / "pruned")]) == 0
    found = run(capsys, 1, tiny_checkpoint, tmp_path / "pruned")
    assert not found["tensors"] and [item["key"] for item in found["config"]] == ["is_pruned"]


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (2, (), "two checkpoints or engines"),
        (2, ("{model}",), "two checkpoints or engines"),
        (4, ("{model}", "{tmp}/nothing"), "there is no model"),
        (4, ("{engine}", "{damaged}"), "does not match its manifest"),
        (2, ("{model}", "{model}", "--jsom"), "--json"),
    ],
)
def test_wrong_input_is_refused_in_two_lines(tiny_checkpoint, tmp_path, capsys, code, arguments, says):
    engine = build_engine(tiny_checkpoint, tmp_path / "engine", build_config({"max_seq_len": 32})).path
    damaged = Path(shutil.copytree(engine, tmp_path / "damaged"))
    (damaged / "rank0.weights").write_bytes(b"short")
    places = {"model": tiny_checkpoint, "engine": engine, "damaged": damaged, "tmp": tmp_path}
    capsys.readouterr()
    assert main([*(text.format(**places) for text in arguments), "--quiet"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 2
    assert captured.err.startswith("trtllm-diff: ") and says in captured.err


def test_people_read_what_differs(tiny_checkpoint, tmp_path, capsys):
    held = load_file(tiny_checkpoint / "model.safetensors")
    other = copied(tiny_checkpoint, tmp_path / "other", {"model.norm.weight": held["model.norm.weight"] * 2})
    assert main([str(tiny_checkpoint), str(other)]) == 1
    out = capsys.readouterr().out
    assert "tensors: 1 different" in out and "relative rms 1" in out
