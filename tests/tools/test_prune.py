"""`trtllm-convert` and `trtllm-prune` as commands: round trips, every option, and every wrong input."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trtllm.compiler.engine import open_engine
from trtllm.compiler.pipeline import build_engine
from trtllm.config import build_config
from trtllm.errors import UsageError
from trtllm.frontends.detect import open_model
from trtllm.runtime.session import open_session
from trtllm.tools.commands.convert import main as convert
from trtllm.tools.commands.prune import main as prune


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny model in this project's format, for two ranks and two stages."""
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    assert convert([str(tiny_checkpoint), "--output-dir", str(folder), "--tp_size", "2", "--pp_size", "2"]) == 0
    return folder


@pytest.fixture(params=["huggingface", "trtllm"])
def checkpoint(request, tiny_checkpoint, converted) -> Path:
    return tiny_checkpoint if request.param == "huggingface" else converted


def payloads(folder: Path) -> dict[str, str]:
    """sha256 of every tensor by its Hugging Face name."""
    tensors = open_model(folder).tensors
    return {name: hashlib.sha256(tensor.read().tobytes()).hexdigest() for name, tensor in tensors.items()}


def run(capsys, command, code, *arguments, says=()) -> dict:
    """Runs a command with --json; holds its exit code and what its error says."""
    assert command([*map(str, arguments), "--json"]) == code
    output = json.loads(capsys.readouterr().out)
    for text in says:
        assert text in output.get("error", "") + output.get("hint", ""), output
    return output


@pytest.mark.parametrize("options", [(), ("--prune-all",), ("--include", "*mlp*"), ("--exclude", "*mlp*")])
def test_pruned_and_restored_checkpoints_hold_the_same_tensors(checkpoint, tmp_path, capsys, options):
    pruned, restored = tmp_path / "pruned", tmp_path / "restored"
    made = run(capsys, prune, 0, checkpoint, "--output-dir", pruned, *options)
    assert made["tensors"] and made["bytes_after"] <= made["bytes_before"] - made["payload_bytes"] + 4096
    assert json.loads((pruned / "config.json").read_text())["is_pruned"] is True
    run(capsys, prune, 0, pruned, "--output_dir", restored, "--restore", checkpoint)
    assert payloads(restored) == payloads(checkpoint)
    assert "is_pruned" not in json.loads((restored / "config.json").read_text())


def test_the_manifest_keeps_shape_type_and_hash_of_what_was_taken_out(tiny_checkpoint, tmp_path, capsys):
    made = run(capsys, prune, 0, "--checkpoint_dir", tiny_checkpoint, "--out_dir", tmp_path / "pruned")
    section = json.loads((tmp_path / "pruned" / "checkpoint_manifest.json").read_text())["pruned"]["model.safetensors"]
    assert list(section) == made["tensors"]
    tensors, hashes = open_model(tiny_checkpoint).tensors, payloads(tiny_checkpoint)
    for name, entry in section.items():
        assert tuple(entry["shape"]) == tensors[name].spec.shape
        assert entry["dtype"] == tensors[name].spec.dtype.value
        assert entry["sha256"] == hashes[name]


def test_a_converted_checkpoint_is_restored_from_the_model_it_came_from(converted, tiny_checkpoint, tmp_path, capsys):
    run(capsys, prune, 0, converted, "--output-dir", tmp_path / "pruned")
    run(capsys, prune, 0, tmp_path / "pruned", "--output-dir", tmp_path / "restored", "--restore", tiny_checkpoint)
    assert payloads(tmp_path / "restored") == payloads(tiny_checkpoint)


def test_a_pruned_checkpoint_builds_a_stripped_engine_that_becomes_the_full_one(checkpoint, tmp_path, capsys):
    options = build_config({"max_seq_len": 32})
    full = build_engine(checkpoint, tmp_path / "full", options)
    run(capsys, prune, 0, checkpoint, "--output-dir", tmp_path / "pruned")
    stripped = build_engine(tmp_path / "pruned", tmp_path / "stripped", options)
    assert stripped.manifest.stripped
    assert stripped.manifest.network_hash == full.manifest.network_hash
    open_engine(stripped.path, verify=True)
    with pytest.raises(UsageError, match="is stripped"):
        open_session(stripped)
    for source in (checkpoint, full.path):
        run(capsys, prune, 0, stripped.path, "--output-dir", tmp_path / "restored", "--restore", source)
        restored = open_engine(tmp_path / "restored", verify=True)
        assert restored.manifest.weights == full.manifest.weights
        assert restored.manifest.files["rank0.weights"] == full.manifest.files["rank0.weights"]
        shutil.rmtree(restored.path)


def test_an_engine_is_stripped_and_restored_by_the_command(tiny_checkpoint, tmp_path, capsys):
    engine = build_engine(tiny_checkpoint, tmp_path / "engine", build_config({"max_seq_len": 32}))
    made = run(capsys, prune, 0, engine.path, "--output-dir", tmp_path / "stripped", "--prune-all")
    assert made["kind"] == "engine" and made["bytes_after"] < made["bytes_before"] - made["payload_bytes"] + 8192
    run(capsys, prune, 0, tmp_path / "stripped", "--output-dir", tmp_path / "again", "--restore", tiny_checkpoint)
    assert (tmp_path / "again" / "rank0.weights").read_bytes() == (engine.path / "rank0.weights").read_bytes()


def test_a_dry_run_names_the_tensors_and_writes_nothing(checkpoint, tmp_path, capsys):
    made = run(capsys, prune, 0, checkpoint, "--output-dir", tmp_path / "pruned", "--dry-run")
    assert made["tensors"] and made["bytes_after"] is None
    assert not list(tmp_path.iterdir())


def test_the_output_stands_beside_the_checkpoint_when_none_is_named(tiny_checkpoint, tmp_path, capsys):
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    run(capsys, prune, 0, tmp_path / "model")
    assert (tmp_path / "model.pruned" / "config.json").is_file()


def test_restoring_from_another_model_names_the_tensors_and_leaves_nothing(synthetic, checkpoint, tmp_path, capsys):
    other = tmp_path / "other"
    synthetic.write_checkpoint(synthetic.PRESETS["tiny"], other, seed=5)
    run(capsys, prune, 0, checkpoint, "--output-dir", tmp_path / "pruned", "--include", "*layers.0.*mlp*")
    said = run(
        capsys, prune, 4, tmp_path / "pruned", "--output-dir", tmp_path / "restored", "--restore", other,
        says=("not those that were pruned", "layers.0.mlp."),
    )  # fmt: skip
    assert "attention" not in said["error"]
    assert {path.name for path in tmp_path.iterdir()} == {"other", "pruned"}


def test_restoring_an_engine_from_another_one_is_refused(synthetic, tiny_checkpoint, tmp_path, capsys):
    """Another quantization, other weights, weights that are missing there too, a model of another width."""
    other = tmp_path / "other"
    synthetic.write_checkpoint(synthetic.PRESETS["tiny"], other, seed=5)
    engine = build_engine(tiny_checkpoint, tmp_path / "engine", build_config({"quantization": "W4A16"}))
    build_engine(tiny_checkpoint, tmp_path / "w8", build_config({"quantization": "W8A16"}))
    build_engine(other, tmp_path / "seed", build_config({"quantization": "W4A16"}))
    run(capsys, prune, 0, tiny_checkpoint, "--output-dir", tmp_path / "narrow", "--mlp-channels", "64")
    run(capsys, prune, 0, engine.path, "--output-dir", tmp_path / "stripped")
    before = {path.name for path in tmp_path.iterdir()}
    for source, says in (
        ("w8", "have other shapes or types"),
        ("seed", "not those that were stripped"),
        ("stripped", "lacks"),
        ("narrow", "another model"),
    ):
        output = run(
            capsys, prune, 4, tmp_path / "stripped", "--output-dir", tmp_path / "o", "--restore", tmp_path / source,
            says=(says,),
        )  # fmt: skip
        assert len(output["error"]) < 400
        assert {path.name for path in tmp_path.iterdir()} == before


def test_what_is_pruned_already_is_not_pruned_again(checkpoint, tmp_path, capsys):
    engine = build_engine(checkpoint, tmp_path / "engine", build_config({}))
    for path, name in ((checkpoint, "a"), (engine.path, "b")):
        run(capsys, prune, 0, path, "--output-dir", tmp_path / name)
        run(capsys, prune, 2, tmp_path / name, "--output-dir", tmp_path / "o", says=("is pruned already",))
        more = run(capsys, prune, 0, tmp_path / name, "--output-dir", tmp_path / f"{name}.all", "--prune-all")
        assert more["tensors"]
        run(capsys, prune, 0, tmp_path / f"{name}.all", "--output-dir", tmp_path / f"{name}.o", "--restore", checkpoint)
    assert payloads(tmp_path / "a.o") == payloads(checkpoint)
    assert (tmp_path / "b.o" / "rank0.weights").read_bytes() == (engine.path / "rank0.weights").read_bytes()


def test_a_bug_shows_its_traceback_when_asked_to(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    def broken(*arguments, **keywords):
        raise AssertionError("of ours")

    monkeypatch.setattr("trtllm.compiler.pruning.strip.strip_path", broken)
    assert prune([str(tiny_checkpoint), "--output-dir", str(tmp_path / "o"), "--log-level", "debug"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "of ours" in said
    run(capsys, prune, 2, tiny_checkpoint, "--log-level", "dbug", says=("did you mean 'debug'",))


def test_a_model_in_one_file_is_sent_to_the_commands_that_take_it(tmp_path, capsys):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    run(capsys, prune, 2, tmp_path / "model.gguf", says=("is a file", "trtllm-convert"))


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (2, (), ("no checkpoint or engine",)),
        (2, ("{model}", "--checkpoint-dir", "elsewhere"), ("two directories",)),
        (4, ("{tmp}/nothing",), ("there is no directory",)),
        (4, ("{tmp}/empty",), ("no config.json",)),
        (2, ("{model}", "--output-dir", "{tmp}/occupied"), ("exists",)),
        (2, ("{model}", "--output-dir", "{tmp}/o", "--include", "*.nothing"), ("no tensor matches",)),
        (2, ("{model}", "--output-dir", "{tmp}/o", "--exclude", "*"), ("no tensor is selected",)),
        (2, ("{model}", "--output-dir", "{tmp}/o", "--restore", "{model}"), ("is not pruned",)),
        (2, ("{model}", "--restore", "{model}", "--prune-all"), ("--restore puts back everything",)),
        (2, ("{model}", "--prune-al"), ("--prune-all",)),
        (3, ("{tmp}/gguf",), ("trtllm-convert",)),
    ],
)
def test_wrong_input_is_refused_and_leaves_nothing(tiny_checkpoint, tmp_path, capsys, code, arguments, says):
    (tmp_path / "empty").mkdir()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "config.json").write_text("{}")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "file").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    run(capsys, prune, code, *(text.format(model=tiny_checkpoint, tmp=tmp_path) for text in arguments), says=says)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_an_incomplete_or_contradicting_checkpoint_is_refused(converted, tmp_path, capsys):
    lacking = Path(shutil.copytree(converted, tmp_path / "lacking"))
    (lacking / "rank3.safetensors").unlink()
    run(capsys, convert, 4, lacking, "--output-dir", tmp_path / "o", says=("lacks rank3.safetensors",))
    other = Path(shutil.copytree(converted, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_attention_heads": 8}))
    run(capsys, convert, 4, other, "--output-dir", tmp_path / "o", says=("contradicts", "num_attention_heads 8"))
    quantized = config | {"quantization": {"quant_algo": "W4A16"}}
    (other / "config.json").write_text(json.dumps(quantized))
    run(capsys, convert, 3, other, "--output-dir", tmp_path / "o", says=("W4A16",))


@pytest.mark.parametrize(
    ("code", "options", "says"),
    [
        (2, ("--tp-size", "3"), ("cannot share equally",)),
        (2, ("--tp-size", "0"), ("at least 1",)),
        (2, ("--pp-size", "3"), ("2 layers",)),
        (2, ("--dtype", "float31"), ("unknown dtype",)),
        (2, ("--model-dir", "elsewhere"), ("two models",)),
    ],
)
def test_a_conversion_that_cannot_be_is_refused(tiny_checkpoint, tmp_path, capsys, code, options, says):
    run(capsys, convert, code, tiny_checkpoint, "--output-dir", tmp_path / "o", *options, says=says)
    assert not list(tmp_path.iterdir())


def test_the_references_own_keys_say_enough_of_a_llama(tiny_checkpoint, converted, tmp_path):
    folder = Path(shutil.copytree(converted, tmp_path / "reference"))
    config = json.loads((folder / "config.json").read_text())
    del config["source_config"]
    (folder / "config.json").write_text(json.dumps(config))
    options = build_config({"max_seq_len": 32})
    ours = build_engine(folder, tmp_path / "a", options)
    theirs = build_engine(tiny_checkpoint, tmp_path / "b", options)
    assert ours.manifest.network_hash == theirs.manifest.network_hash
    assert {e.name: e.sha256 for e in ours.manifest.weights} == {e.name: e.sha256 for e in theirs.manifest.weights}


@pytest.mark.parametrize("command", ["convert", "prune"])
def test_a_killed_run_leaves_nothing_at_the_output(synthetic, tmp_path, command):
    model, out = tmp_path / "model", tmp_path / "out"
    synthetic.write_checkpoint(synthetic.PRESETS["300mb"], model)
    process = subprocess.Popen(
        [sys.executable, "-m", f"trtllm.tools.commands.{command}", str(model), "--output-dir", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    while process.poll() is None and not any(tmp_path.glob(".out.partial-*/*.safetensors")):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_pruned_split_checkpoint_of_a_tied_model_is_restored_from_the_model(tiny_checkpoint, tmp_path, capsys):
    """Padded rows of the vocabulary and the copies of the tied head are made again."""
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    split = ("--tp-size", "8", "--use-parallel-embedding")
    run(capsys, convert, 2, model, "--output-dir", tmp_path / "o", *split, says=("cannot share equally",))
    split = ("--tp-size", "4", "--pp-size", "2", "--use-parallel-embedding")
    run(capsys, convert, 0, model, "--output-dir", tmp_path / "split", *split)
    run(capsys, prune, 0, tmp_path / "split", "--output-dir", tmp_path / "pruned", "--prune-all")
    run(capsys, prune, 0, tmp_path / "pruned", "--output-dir", tmp_path / "restored", "--restore", model)
    for rank in range(8):
        name = f"rank{rank}.safetensors"
        assert (tmp_path / "restored" / name).read_bytes() == (tmp_path / "split" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "weights"),
    [(("--layers", "1"), None), (("--mlp-channels", "48"), None), (("--method", "wanda", "--structure", "2:4"), 0)],
)
@pytest.mark.parametrize("format", ["huggingface", "trtllm"])
def test_a_model_is_pruned_for_good_and_reported(tiny_checkpoint, tmp_path, capsys, options, weights, format):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 80)
    out = tmp_path / "smaller"
    made = run(
        capsys, prune, 0, tiny_checkpoint, "--output-dir", out, *options, "--calib-dataset", text, "--format", format
    )  # fmt: skip
    before, after = made["before"], made["after"]
    if weights is None:
        assert after["parameters"] < before["parameters"] and after["weights_bytes"] < before["weights_bytes"]
    else:
        assert after["zeros"] > before["zeros"] + 0.1
    assert before["perplexity"] > 1 and after["perplexity"] > 1 and after["tokens_per_second"] > 0
    assert open_model(out).nbytes == after["weights_bytes"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--sparsity", "0.5"), "go with --method"),
        (("--method", "wonda"), "did you mean 'wanda'"),
        (("--method", "wanda", "--structure", "2-4"), "is no N:M"),
        (("--method", "wanda", "--structure", "2:4", "--sparsity", "0.5"), "how many weights stay"),
        (("--layers", "1", "--prune-all"), "either taken out"),
        (("--layers", "1", "--format", "gguf"), "unknown format"),
        (("--method", "wanda", "--heads", "2"), "chosen after"),
    ],
)
def test_a_pruning_without_sense_is_refused(tiny_checkpoint, tmp_path, capsys, options, says):
    run(capsys, prune, 2, tiny_checkpoint, "--output-dir", tmp_path / "o", *options, says=(says,))
    assert not list(tmp_path.iterdir())
