"""trtllm-refit as it is called: spellings, reports, results as JSON, and errors in two lines."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trtllm.compiler.engine import open_engine
from trtllm.compiler.pipeline import compile as compile_engine
from trtllm.frontends.detect import open_model
from trtllm.tools.commands.refit import main


@pytest.fixture
def engine(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return compile_engine(tiny_checkpoint, output_dir=tmp_path / "engine", max_seq_len=32, max_batch_size=2).path


@pytest.fixture
def tuned(synthetic: ModuleType, tmp_path: Path) -> Path:
    synthetic.write_checkpoint(synthetic.PRESETS["tiny"], tmp_path / "tuned", seed=1)
    return tmp_path / "tuned"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_every_spelling_refits(engine: Path, tuned: Path, tmp_path: Path, run: Callable) -> None:
    spellings = (
        (engine, tuned),
        ("--engine_dir", engine, "--checkpoint_dir", tuned),
        ("--engine-dir", engine, tuned),
    )
    for number, spelling in enumerate(spellings):
        code, out, err = run(*spelling, "--output_dir", tmp_path / f"out{number}")
        assert code == 0, err
        assert out.startswith(f"refitted {tmp_path / f'out{number}'}: ")
        assert "verified: logits of 8 tokens differ by 0" in out
    weights = {(tmp_path / f"out{number}" / "rank0.weights").read_bytes() for number in range(3)}
    assert len(weights) == 1
    assert run(engine, tuned, "--quiet")[:2] == (0, "")
    assert (tmp_path / "engine.refit" / "manifest.json").is_file()


def test_a_dry_run_prints_the_report_and_writes_nothing(
    engine: Path, tuned: Path, tmp_path: Path, run: Callable
) -> None:
    code, out, _ = run(engine, tuned, "--dry-run")
    assert code == 0
    assert "weights are made anew" in out
    code, out, _ = run(engine, tuned, "--dry-run", "--json")
    result = json.loads(out)
    assert (code, result["refitted"], result["report"]["problems"]) == (0, False, [])
    assert not (tmp_path / "engine.refit").exists()


def test_problems_are_told_all_at_once_in_two_lines_or_as_json(
    engine: Path, tuned: Path, tmp_path: Path, run: Callable
) -> None:
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"architectures": ["MistralForCausalLM"], "vocab_size": 7}))
    code, out, err = run(engine, tuned, "--quiet")
    lines = err.splitlines()
    assert (code, out, len(lines)) == (4, "", 2)
    assert "MistralForCausalLM" in lines[0]
    assert "vocabulary has 7 tokens" in lines[0]
    code, out, _ = run(engine, tuned, "--dry-run", "--json")
    assert code == 4
    assert len(json.loads(out)["report"]["problems"]) == 2
    assert not (tmp_path / "engine.refit").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no engine is given"),
        (("E",), "no model is given"),
        (("E", "M", "--in-place", "--output-dir", "O"), "exclude each other"),
        (("E", "M", "--strength", "-1"), "out of range"),
        (("E", "M", "--revrt"), "did you mean '--revert'"),
    ],
)
def test_misuse_is_a_usage_error(arguments: tuple[str, ...], words: str, run: Callable) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert words in err


def test_in_place_then_back(engine: Path, tuned: Path, tiny_checkpoint: Path, run: Callable) -> None:
    before = (engine / "rank0.weights").read_bytes()
    assert run(engine, tuned, "--in-place", "--quiet")[0] == 0
    assert (engine / "rank0.weights").read_bytes() != before
    open_engine(engine, verify=True)
    assert run(engine, "--revert", "--base", tiny_checkpoint, "--in-place", "--quiet")[0] == 0
    assert (engine / "rank0.weights").read_bytes() == before
    code, _, err = run(engine, "--revert", "--base", tiny_checkpoint)
    assert code == 2
    assert "there is nothing to revert" in err


def changed(model: Path, folder: Path, change: Callable[[dict], None] = lambda tensors: None, **config: object) -> Path:
    """A copy of a checkpoint with other tensors and config."""
    shutil.copytree(model, folder)
    tensors = {name: np.array(value) for name, value in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def other_architecture(tuned: Path, folder: Path) -> Path:
    return changed(tuned, folder, architectures=["Qwen2ForCausalLM"])


def other_vocabulary(tuned: Path, folder: Path) -> Path:
    def narrow(tensors: dict) -> None:
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = tensors[name][:200]

    return changed(tuned, folder, narrow, vocab_size=200)


def one_tensor_less(tuned: Path, folder: Path) -> Path:
    return changed(tuned, folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def cut_short(tuned: Path, folder: Path) -> Path:
    shutil.copytree(tuned, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    return folder


def not_finite(tuned: Path, folder: Path) -> Path:
    def spoil(tensors: dict) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.nan

    return changed(tuned, folder, spoil)


def adapter_of_another_base(tuned: Path, folder: Path) -> Path:
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {f"{name}.lora_A.weight": (4, 128), f"{name}.lora_B.weight": (128, 4)}
    save_file(
        {key: np.ones(shape, np.float32) for key, shape in matrices.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    return folder


QUANTIZED = Path(__file__).parents[1] / "frontends" / "quantized" / "fixtures" / "models"


@pytest.mark.parametrize(
    ("model", "words", "hint"),
    [
        ("gptq_v2_order_8_bits", "is stored as GPTQ 8 bits in activation order", "of the same quantization"),
        (
            "bitsandbytes_int8",
            "is stored as bitsandbytes 8 bits, whose integers need 8 bits",
            "of the same quantization",
        ),
        ("gptq", "a build of the checkpoint has another graph", "build the engine anew"),
        ("plain", "is stored as float32", "of the same quantization"),
    ],
)
def test_a_checkpoint_of_another_quantization_is_refused(
    tmp_path: Path, run: Callable, model: str, words: str, hint: str
) -> None:
    engine = compile_engine(QUANTIZED / "awq", output_dir=tmp_path / "engine", max_seq_len=32, max_batch_size=2).path
    before = {path.name: path.read_bytes() for path in engine.iterdir()}
    given = tmp_path / "plain" if model == "plain" else QUANTIZED / model
    if model == "plain":
        dense = open_model(QUANTIZED / "awq")
        given.mkdir()
        save_file({name: tensor.read() for name, tensor in dense.tensors.items()}, given / "model.safetensors")
        config = {key: value for key, value in dense.config.items() if key != "quantization_config"}
        (given / "config.json").write_text(json.dumps(config | {"architectures": [dense.architecture]}))
    code, out, err = run(engine, given, "--quiet")
    assert (code, out) == (4, "")
    first, second = err.splitlines()
    assert words in first
    assert hint in second
    assert {path.name: path.read_bytes() for path in engine.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"engine", "plain"}


@pytest.mark.parametrize(
    ("make", "words", "hint"),
    [
        (other_architecture, "it is a Qwen2ForCausalLM, the engine a LlamaForCausalLM", "trtllm-build"),
        (other_vocabulary, "its vocabulary has 200 tokens, the engine's 300", "trtllm-build"),
        (one_tensor_less, "1 tensors are missing: model.layers.1.mlp.up_proj.weight", "--partial"),
        (cut_short, "model.safetensors", "fetch"),
        (not_finite, "cannot quantize", "fetch"),
        (adapter_of_another_base, "q_proj is 64x64 in the base, the adapter is of one of 128x128", "base"),
    ],
)
def test_what_does_not_fit_is_said_in_two_lines_and_leaves_nothing(
    tiny_checkpoint: Path, tuned: Path, tmp_path: Path, run: Callable,
    make: Callable[[Path, Path], Path], words: str, hint: str,
) -> None:  # fmt: skip
    engine = compile_engine(
        tiny_checkpoint, output_dir=tmp_path / "engine", quantization="W8A16", max_seq_len=32, max_batch_size=2
    ).path
    model = make(tuned, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in engine.iterdir()}
    code, out, err = (
        run(engine, model, "--base", tiny_checkpoint, "--quiet")
        if "adapter" in make.__name__
        else run(engine, model, "--quiet")
    )
    print(err)
    assert (code, out) == (4, "")
    first, second = err.splitlines()
    assert first.startswith("trtllm-refit: ")
    assert second.startswith("  ")
    assert words in first
    assert hint in second
    assert {path.name: path.read_bytes() for path in engine.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} <= {"engine", "model", "tuned"}
