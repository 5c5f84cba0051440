"""`trtllm-inspect`: what it says of engines and checkpoints is what is in them, as text, JSON and one page."""

import hashlib
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.quantize import dequantize_blocks, quantize_blocks
from trtllm.compiler.inspection.contents import inspect, numbered_together
from trtllm.compiler.inspection.page import page
from trtllm.compiler.pipeline import build_engine
from trtllm.compiler.refit.recipes import stored_recipes
from trtllm.config import build_config
from trtllm.frontends.detect import open_model
from trtllm.progress import Silent
from trtllm.tools.commands.convert import main as convert
from trtllm.tools.commands.inspect import main
from trtllm.tools.commands.prune import main as prune
from trtllm.tools.commands.refit import main as refit

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Reads a page, holding that every element is closed in order; keeps what it links to and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.outside, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.outside += [value for key, value in attrs if key in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def engine(tiny_checkpoint, tmp_path_factory):
    options = build_config({"max_seq_len": 32, "max_batch_size": 4, "quantization": "W4A16"})
    return build_engine(tiny_checkpoint, tmp_path_factory.mktemp("inspected") / "engine", options)


def run(capsys, code, *arguments) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_an_engines_weights_are_those_of_its_manifest(engine, capsys):
    found = run(capsys, 0, engine.path)
    assert found["kind"] == "engine" and found["state"] == "complete" and found["architecture"] == "LlamaForCausalLM"
    entries = {entry.name: entry for entry in engine.manifest.weights}
    assert [weight["name"] for weight in found["weights"]] == list(entries)
    for weight in found["weights"]:
        entry = entries[weight["name"]]
        assert (weight["sha256"], weight["nbytes"], weight["dtype"]) == (entry.sha256, entry.nbytes, entry.dtype)
    assert found["bytes"] == engine.manifest.weights_nbytes
    by_name = {weight["name"]: weight for weight in found["weights"]}
    packed = by_name["model.layers.1.self_attn.qkv_proj.weight_values_tiles"]
    sources = ", ".join(f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv")
    assert packed["recipe"] == f"tiled_values(quantized_values(concat({sources})))"
    assert packed["layer"] == 1


def test_the_graph_is_cut_into_layers_and_counts_every_weight_once(engine, capsys):
    graph = run(capsys, 0, engine.path)["graph"]
    assert [layer["title"] for layer in graph["layers"]] == [
        "before the layers", "layer 0", "layer 1", "behind the layers",
    ]  # fmt: skip
    assert sum(graph["operators"].values()) == sum(len(layer["operators"]) for layer in graph["layers"])
    assert graph["operators"]["trtllm.cpu.PagedAttention"] == 2
    read = [name for layer in graph["layers"] for item in layer["operators"] for name in item["weights"]]
    rotary = {entry.name for entry in engine.manifest.weights} - set(read)
    assert len(set(read)) == len(read) and all(name.startswith("rotary") for name in rotary)


def test_the_memory_plan_is_the_caches_arithmetic(engine, capsys):
    plan = run(capsys, 0, engine.path)["memory"]
    model = engine.config["pretrained_config"]
    head = model["hidden_size"] // model["num_attention_heads"]
    per_token = 2 * model["num_hidden_layers"] * model["num_key_value_heads"] * head * 4  # keys and values, float32
    assert plan["cache_per_token"] == per_token
    assert plan["cache_at_limits"] == 4 * 32 * per_token
    assert plan["weights"] == engine.manifest.weights_nbytes


def test_quantization_errors_are_those_of_rounding_each_weight(engine, tiny_checkpoint, capsys):
    found = run(capsys, 0, engine.path, "--reference", tiny_checkpoint)["quantization_error"]
    assert not found["unknown"]
    reader, recipes = RecipeReader(open_model(tiny_checkpoint).tensors), stored_recipes(engine)
    squares, energy = {}, {}
    for item in found["weights"]:
        quantized = recipes[item["name"]].of
        full = reader.read(quantized.of).astype(np.float32)
        blocks = quantize_blocks(full, quantized.bits, 32, "float16")
        error = dequantize_blocks(blocks, quantized.bits).astype(np.float64) - full
        assert item["relative_rms"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(full), rel=1e-6)
        assert item["max_error"] == pytest.approx(np.abs(error).max(), rel=1e-6)
        layer = item["name"].split(".")[2] if ".layers." in item["name"] else "outside"
        squares[layer] = squares.get(layer, 0) + np.square(error).sum()
        energy[layer] = energy.get(layer, 0) + np.square(full, dtype=np.float64).sum()
    assert found["by_layer"] == pytest.approx({k: math.sqrt(squares[k] / energy[k]) for k in squares}, rel=1e-6)
    assert set(found["by_layer"]) == {"0", "1", "outside"}


def test_a_checkpoints_tensors_are_listed_and_hashed_when_asked(tiny_checkpoint, tmp_path, capsys):
    assert convert([str(tiny_checkpoint), "--output-dir", str(tmp_path / "converted"), "--tp-size", "2"]) == 0
    tensors = open_model(tiny_checkpoint).tensors
    for folder in (tiny_checkpoint, tmp_path / "converted"):
        plain, hashed = run(capsys, 0, folder), run(capsys, 0, folder, "--hashes")
        assert {weight["sha256"] for weight in plain["weights"]} == {""}
        assert {weight["name"]: weight["sha256"] for weight in hashed["weights"]} == {
            name: hashlib.sha256(tensor.read().tobytes()).hexdigest() for name, tensor in tensors.items()
        }
        assert plain["graph"] is None and plain["memory"] is None


def test_a_gguf_file_names_its_quantizations(smollm2_gguf, capsys):
    found = run(capsys, 0, smollm2_gguf)
    methods = {weight["quantization"] for weight in found["weights"]}
    assert found["architecture"] == "LlamaForCausalLM" and "GGUF Q4_1" in methods


def test_weights_that_keep_their_quantization_have_no_error(smollm2_gguf, tmp_path):
    engine = build_engine(smollm2_gguf, tmp_path / "engine", build_config({"max_seq_len": 64}))
    errors = inspect(str(engine.path), Silent(), reference=str(smollm2_gguf)).errors
    kept = [item for item in errors.weights if ".layers." in item.name]  # Q4_1: integers, scales and minima
    assert len(kept) == 30 * 4
    assert {item.max_error for item in kept} == {0.0}


def test_what_is_missing_or_refitted_is_said(engine, tiny_checkpoint, tmp_path, capsys):
    assert prune([str(engine.path), "--output-dir", str(tmp_path / "stripped")]) == 0
    assert prune([str(tiny_checkpoint), "--output-dir", str(tmp_path / "pruned")]) == 0
    assert refit([str(engine.path), str(tiny_checkpoint), "--output-dir", str(tmp_path / "again")]) == 0
    stripped, pruned = run(capsys, 0, tmp_path / "stripped"), run(capsys, 0, tmp_path / "pruned")
    count = sum(weight["state"] == "stripped" for weight in stripped["weights"])
    assert count and stripped["state"] == f"stripped: {count} of {len(stripped['weights'])} weights are missing"
    assert any(weight["state"] == "pruned" and weight["sha256"] for weight in pruned["weights"])
    assert pruned["state"].startswith("pruned: ")
    assert run(capsys, 0, tmp_path / "again")["state"].startswith("refitted")


def test_the_page_is_one_file_of_closed_elements_with_a_box_for_each_layer(engine, tiny_checkpoint, tmp_path, capsys):
    file = tmp_path / "page.html"
    assert main([str(engine.path), "--html", str(file), "--reference", str(tiny_checkpoint)]) == 0
    text = file.read_text()
    read = Page(text)
    assert read.open == [] and read.outside == [] and "url(" not in text and "@import" not in text
    assert not any(tag in ("script", "link", "img", "iframe") for tag, _ in read.tags)
    boxes = [attributes for tag, attributes in read.tags if attributes.get("class") == "layer"]
    assert len(boxes) == 4 and sum("open" in attributes for attributes in boxes) == 1
    for words in ("layer 0", "layer 1", "trtllm.cpu.PagedAttention", "cache at the limits", "relative rms"):
        assert words in read.text
    assert all(entry.name in read.text for entry in engine.manifest.weights)
    widths = [attributes["style"] for tag, attributes in read.tags if "style" in attributes]
    assert all(0 <= float(width.removeprefix("width:").removesuffix("%")) <= 100 for width in widths)


def test_operators_say_what_they_read(engine, capsys):
    found = run(capsys, 0, engine.path)
    operators = {item["name"]: item for box in found["graph"]["layers"] for item in box["operators"]}
    inputs = {text.split(" ")[0] for text in found["inputs"]}
    assert {name for item in operators.values() for name in item["reads"]} <= operators.keys() | inputs
    attention = operators["layers.1.attention/paged"]["reads"]
    assert attention[0] == "model.layers.1.self_attn.qkv_proj/matmul" and "past_key.1" in attention
    read = {name for item in operators.values() for name in item["reads"]}
    (last,) = operators.keys() - read  # only the logits are read by nobody
    assert operators[last]["weights"]


def test_inputs_that_differ_by_their_number_are_one():
    items = ["input_ids int64[1]", *(f"past_key.{n} float[2, 3]" for n in range(12)), "a.0 int64[1]", "a.1 int64[1]"]
    assert numbered_together(items) == [
        "input_ids int64[1]", "past_key.0..11 float[2, 3] (12 of them)", "a.0 int64[1]; a.1 int64[1]",
    ]  # fmt: skip


def test_sizes_tell_files_and_missing_weights_apart(engine, tiny_checkpoint, tmp_path, capsys):
    found = run(capsys, 0, tiny_checkpoint)
    assert found["stored_bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert prune([str(engine.path), "--output-dir", str(tmp_path / "stripped")]) == 0
    stripped = run(capsys, 0, tmp_path / "stripped")
    gone = [weight["nbytes"] for weight in stripped["weights"] if weight["state"] != "held"]
    assert stripped["missing_bytes"] == sum(gone) > 0 and stripped["bytes"] == sum(
        entry.nbytes for entry in engine.manifest.weights
    )


def test_an_adapter_is_shown_without_its_base(tmp_path, capsys):
    folder = tmp_path / "adapter"
    folder.mkdir()
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    parts = {f"{stem}.lora_A.weight": np.ones((2, 8), np.float32), f"{stem}.lora_B.weight": np.ones((6, 2), np.float32)}
    save_file(parts, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "the/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = run(capsys, 0, folder, "--hashes")
    assert found["kind"] == "adapter" and found["model"]["r"] == 2 and "the/base" in found["notes"][0]
    assert {weight["name"]: weight["layer"] for weight in found["weights"]} == dict.fromkeys(parts, 1)
    hashes = {weight["name"]: weight["sha256"] for weight in found["weights"]}
    assert hashes == {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in parts.items()}


def test_names_in_a_page_are_text_not_markup(tiny_checkpoint, tmp_path):
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "a<script>b"))
    text = page(inspect(str(model), Silent()))
    assert "<script>" not in text and "a&lt;script&gt;b" in text


def test_text_lists_what_is_asked_for(engine, capsys):
    name = "model.layers.0.mlp.down_proj.weight_values_tiles"
    assert main([str(engine.path)]) == 0
    brief = capsys.readouterr().out
    assert "complete" in brief and "trtllm.cpu.QuantizedLinear" in brief and name not in brief
    assert main([str(engine.path), "--weights", "--recipes", "--graph"]) == 0
    full = capsys.readouterr().out
    assert full.count(name) == 2 and "layers.1.attention/paged" in full and "block_table.0" in full


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (2, (), "nothing to inspect"),
        (4, ("{tmp}/nothing",), "there is no model"),
        (4, ("{tmp}/damaged",), "does not match its manifest"),
        (4, ("{tmp}/graphless",), "is no ONNX graph"),
        (2, ("{engine}", "--html", "{tmp}/taken.html"), "exists"),
        (2, ("{engine}", "--html", "{tmp}/nowhere/page.html"), "nowhere"),
        (2, ("{model}", "--reference", "{model}"), "--reference goes with an engine"),
        (4, ("{engine}", "--reference", "{tmp}/other"), "expected"),
        (2, ("{engine}", "--weight"), "--weights"),
    ],
)
def test_wrong_input_is_refused_in_two_lines(engine, tiny_checkpoint, tmp_path, capsys, code, arguments, says):
    (tmp_path / "taken.html").write_text("mine")
    damaged = Path(shutil.copytree(engine.path, tmp_path / "damaged"))
    (damaged / "rank0.weights").unlink()
    graphless = Path(shutil.copytree(engine.path, tmp_path / "graphless"))
    size = (graphless / "rank0.engine").stat().st_size
    (graphless / "rank0.engine").write_bytes(b"\xff" * size)
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    shapes = {name: tensor.read() for name, tensor in open_model(tiny_checkpoint).tensors.items()}
    cut = {name: np.ascontiguousarray(array[..., :32].astype(np.float32)) for name, array in shapes.items()}
    save_file(cut, other / "model.safetensors", metadata={"format": "pt"})
    places = {"model": tiny_checkpoint, "engine": engine.path, "tmp": tmp_path}
    capsys.readouterr()
    assert main([*(text.format(**places) for text in arguments), "--quiet"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 2, captured.err
    assert captured.err.startswith("trtllm-inspect: ") and says in captured.err
    assert (tmp_path / "taken.html").read_text() == "mine"
