"""The kernels' PTX is that of their source, and copies that run at the same time do not meet."""

import hashlib
import random
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from trtllm.runtime.cuda.cache_kernels import PTX, independent_runs

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "runtime" / "cuda" / "cache_kernels.cu"
SCRIPT = ROOT / "tools" / "dev" / "make_ptx.sh"


def shipped() -> str:
    return resources.files("trtllm.runtime.cuda").joinpath(PTX).read_text(encoding="ascii")


def test_the_shipped_ptx_was_made_of_the_source() -> None:
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    assert digest in shipped().splitlines()[0], f"run {SCRIPT.relative_to(ROOT)}"


def test_old_drivers_and_gpus_take_the_ptx() -> None:
    assert "\n.version 7.0\n.target sm_75\n" in shipped()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not there")
def test_compiling_the_source_gives_kernels_of_the_same_faces(tmp_path: Path) -> None:
    """Not the same text: another nvcc allots registers in its own way."""
    subprocess.run([str(SCRIPT), str(SOURCE), str(tmp_path / PTX)], check=True)

    def faces(text: str) -> list[str]:
        return [line.strip() for line in text.splitlines() if ".entry" in line or line.strip().startswith(".param")]

    made = (tmp_path / PTX).read_text(encoding="ascii")
    assert faces(made) == faces(shipped())
    assert len([line for line in faces(made) if ".entry" in line]) == 6


def test_runs_of_copies_give_what_one_after_the_other_gives() -> None:
    """In a run every source is read before any destination is written; 300 random lists."""
    for seed in range(300):
        draw = random.Random(seed)
        copies = [(draw.randrange(2), draw.randrange(6), draw.randrange(6), 1) for _ in range(draw.randrange(1, 12))]
        expected = {(group, block): (group, block) for group in range(2) for block in range(6)}
        for group, source, destination, _ in copies:
            expected[group, destination] = expected[group, source]
        found = {place: place for place in expected}
        runs = list(independent_runs(copies))
        assert [first for first, _ in runs] == [0, *(end for _, end in runs[:-1])] and runs[-1][1] == len(copies)
        for first, end in runs:
            batch = copies[first:end]
            assert len({(group, destination) for group, _, destination, _ in batch}) == len(batch)
            taken = [found[group, source] for group, source, _, _ in batch]
            for (group, _, destination, _), value in zip(batch, taken, strict=True):
                found[group, destination] = value
        assert found == expected
