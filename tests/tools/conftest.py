"""Running trtllm-build inside the test process, and a checkpoint that a test may damage."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from trtllm.tools.commands.build import main


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_build(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Calls the command's main function."""

    def run(*arguments: str | Path) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))


@pytest.fixture
def fails(run_build: Callable[..., Ran], tmp_path: Path) -> Callable[..., Ran]:
    """Runs a build into tmp_path/out that must fail with two lines and leave nothing there."""

    def run(code: int, *arguments: str | Path, says: tuple[str, ...] = ()) -> Ran:
        output = tmp_path / "parent" / "out"
        output.parent.mkdir(exist_ok=True)
        ran = run_build(*arguments, "--output-dir", output, "--quiet")
        lines = ran.err.splitlines()
        assert ran.code == code, ran.err
        assert len(lines) == 2, ran.err
        assert lines[0].startswith("trtllm-build: ")
        assert lines[1].startswith("  ")
        assert ran.out == ""
        assert list(output.parent.iterdir()) == []
        for words in says:
            assert words in ran.err
        return ran

    return run
