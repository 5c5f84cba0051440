"""trtllm-refit as it is called: spellings, reports, results as JSON, and errors in two lines."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from trtllm.compiler.engine import open_engine
from trtllm.compiler.pipeline import compile as compile_engine
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
