"""`trtllm-compare`: the model's side is transformers' own, and a layer that was changed is the one that is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.inspection.comparison import LOGITS, ComparisonText, _network, _rows, compare
from trtllm.compiler.inspection.taps import EngineTaps, reference_taps
from trtllm.compiler.pipeline import build_engine
from trtllm.config import build_config
from trtllm.frontends.detect import open_model
from trtllm.progress import Silent
from trtllm.tools.commands.compare import main
from trtllm.tools.commands.prune import main as prune


def engine_of(model: Path, folder: Path, **options: object) -> Path:
    return build_engine(model, folder, build_config({"max_seq_len": 32, **options})).path


def run(capsys, code, *arguments) -> dict:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_engine_in_full_precision_diverges_nowhere(tiny_checkpoint, tmp_path, capsys, level):
    engine = engine_of(tiny_checkpoint, tmp_path / "engine", optimization_level=level)
    found = run(capsys, 0, engine, tiny_checkpoint, "--length", 24)
    assert found["agreement"] == 1 and found["divergence"] < 1e-6 and found["first_diverging"] is None
    assert [place["name"] for place in found["places"]] == [
        *(f"model.layers.{layer}.{norm}_layernorm.weight" for layer in (0, 1) for norm in ("input", "post_attention")),
        "model.norm.weight",
    ]
    assert [place["layer"] for place in found["places"]] == [None, 0, 0, 1, 1]
    assert found["tokens"] == 4 * 24


def test_the_models_side_is_what_transformers_computes(tiny_checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    checkpoint = open_model(tiny_checkpoint)
    engine = build_engine(tiny_checkpoint, tmp_path / "engine", build_config({"max_seq_len": 32}))
    rows = _rows(engine, checkpoint, ComparisonText(rows=2, length=20))
    network = _network(engine, checkpoint, 20)
    taps = {tap.name: tap for tap in reference_taps(network, RecipeReader(checkpoint.tensors), rows, Silent())}
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32)
    for index, tokens in enumerate(rows):
        with torch.no_grad():
            made = model(torch.tensor(tokens[None]), output_hidden_states=True)
        np.testing.assert_allclose(taps[LOGITS].rows[index], made.logits[0].numpy(), rtol=0, atol=2e-6)
        for layer in (0, 1):
            states = taps[f"model.layers.{layer}.input_layernorm.weight"].rows[index]
            np.testing.assert_allclose(states, made.hidden_states[layer][0].numpy(), rtol=0, atol=2e-6)


def test_the_engines_logits_are_those_of_its_session(tiny_checkpoint, tmp_path):
    from trtllm.runtime.perplexity import scoring_session, window_logits

    engine = build_engine(
        tiny_checkpoint, tmp_path / "engine", build_config({"max_seq_len": 64, "quantization": "W4A16"})
    )
    tokens = np.arange(40, dtype=np.int64) * 7 % 300
    tapped = EngineTaps(engine, threads=1).read([tokens])[LOGITS].rows[0]
    served = next(window_logits(scoring_session(engine, 40, threads=1), tokens))
    np.testing.assert_allclose(tapped, served, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tensor", "layer", "place"),
    [
        ("model.embed_tokens.weight", None, "model.layers.0.input_layernorm.weight"),
        ("model.layers.0.self_attn.v_proj.weight", 0, "model.layers.0.post_attention_layernorm.weight"),
        ("model.layers.0.mlp.up_proj.weight", 0, "model.layers.1.input_layernorm.weight"),
        ("model.layers.1.self_attn.o_proj.weight", 1, "model.layers.1.post_attention_layernorm.weight"),
        ("model.layers.1.mlp.down_proj.weight", 1, "model.norm.weight"),
    ],
)
@pytest.mark.parametrize("scheme", [None, "W8A16"])
def test_the_layer_that_was_changed_is_the_first_to_diverge(
    tiny_checkpoint, tmp_path, capsys, tensor, layer, place, scheme
):
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    held = load_file(other / "model.safetensors")
    held[tensor] = -held[tensor]  # far beyond rounding, and no larger
    save_file(held, other / "model.safetensors", metadata={"format": "pt"})
    engine = engine_of(tiny_checkpoint, tmp_path / "engine", quantization=scheme)
    assert run(capsys, 0, engine, tiny_checkpoint, "--length", 16)["first_diverging"] is None
    wrong = engine_of(other, tmp_path / "wrong", quantization=scheme)
    # the tolerance of the unchanged model: measured against it, the changed weight would excuse itself
    found = run(capsys, 1, wrong, tiny_checkpoint, "--length", 16, "--tolerance", 0.05)
    assert (found["first_diverging"]["layer"], found["first_diverging"]["name"]) == (layer, place)


def test_a_quantized_engine_is_further_away_and_within_what_rounding_explains(tiny_checkpoint, tmp_path, capsys):
    found = {
        scheme: run(capsys, 0, engine_of(tiny_checkpoint, tmp_path / scheme, quantization=scheme), tiny_checkpoint)
        for scheme in ("W8A16", "W4A16")
    }
    assert 0 < found["W8A16"]["divergence"] < found["W4A16"]["divergence"]
    for place in found["W4A16"]["places"]:
        assert place["relative_rms"] <= place["tolerance"]


def test_prompts_of_different_lengths_are_rows(tiny_checkpoint, tmp_path, capsys):
    engine = engine_of(tiny_checkpoint, tmp_path / "engine")
    found = run(capsys, 0, engine, tiny_checkpoint, "--prompt", "hello", "--prompt", "a longer prompt")
    assert found["rows"] == 2 and found["logits"] == found["tokens"] > 2


def test_an_engine_that_gives_last_logits_only_is_compared_on_those(tiny_checkpoint, tmp_path):
    engine = build_engine(
        tiny_checkpoint, tmp_path / "engine", build_config({"max_seq_len": 32, "optimization_level": 0})
    )
    found = compare(engine, open_model(tiny_checkpoint), ComparisonText(rows=3, length=16), Silent())
    assert (found.logits, found.tokens) == (3, 48)


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (2, (), "an engine and a model"),
        (2, ("{engine}",), "an engine and a model"),
        (2, ("{engine}", "{model}", "--prompt", "a", "--dataset", "b"), "exclude each other"),
        (2, ("{engine}", "{model}", "--prompt", "long " * 40), "the engine takes 1 to 32"),
        (2, ("{engine}", "{model}", "--rows", "0"), "rows"),
        (2, ("{stripped}", "{model}"), "is stripped"),
        (2, ("{engine}", "{model}", "--tolerence", "1"), "--tolerance"),
        (4, ("{model}", "{model}"), "no manifest.json"),
        (4, ("{engine}", "{tmp}/nothing"), "there is no model"),
        (4, ("{engine}", "{model}", "--dataset", "{tmp}/nothing"), "cannot read"),
        (4, ("{engine}", "{other}"), "vocab_size"),
    ],
)
def test_wrong_input_is_refused_in_two_lines(tiny_checkpoint, tmp_path, capsys, code, arguments, says):
    engine = engine_of(tiny_checkpoint, tmp_path / "engine")
    assert prune([str(engine), "--output-dir", str(tmp_path / "stripped")]) == 0
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    held = load_file(other / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = held[name][:200]
    save_file(held, other / "model.safetensors", metadata={"format": "pt"})
    places = {
        "engine": engine, "model": tiny_checkpoint, "stripped": tmp_path / "stripped", "other": other, "tmp": tmp_path,
    }  # fmt: skip
    capsys.readouterr()
    assert main([*(text.format(**places) for text in arguments), "--quiet"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 2, captured.err
    assert captured.err.startswith("trtllm-compare: ") and says in captured.err
