"""What a build costs: seconds and peak memory of `trtllm-build`, beside one reading and one writing of the weights.

    python benchmarks/build_cost.py MODEL... [--targets onnxruntime tensorrt] [--quantizations none W8A16 W4A16]
    python benchmarks/build_cost.py --synthetic llama3-8b --layers 2 8 16 32 --quantizations W4A16

Every build is a process of its own; its peak is the largest resident set that the kernel saw (ru_maxrss). Nothing is
dropped from the page cache: "read" is timed just before the build, so both find of the source what memory holds of it,
and the build may find more. "write" writes as many bytes as the engine has, and syncs, as the build does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

BLOCK = 8 << 20
COMMAND = [sys.executable, "-m", "trtllm.tools.commands.build"]


@dataclass(frozen=True)
class Case:
    """One build."""

    name: str
    model: Path
    target: str
    quantization: str


@dataclass(frozen=True)
class Cost:
    """What was measured; bytes and seconds."""

    model: str
    target: str
    quantization: str
    source_bytes: int
    engine_bytes: int
    seconds: float
    peak_memory: int
    planned_memory: int
    read_seconds: float
    write_seconds: float

    @property
    def ratio(self) -> float:
        """Against reading once and writing once."""
        return self.seconds / (self.read_seconds + self.write_seconds)


def weight_files(model: Path) -> list[Path]:
    """The files that a build reads, largest part of them at least."""
    return [model] if model.is_file() else sorted([*model.glob("*.safetensors"), *model.glob("*.gguf")])


def read_once(files: Iterable[Path]) -> float:
    """Seconds to read the files from front to back."""
    buffer, begun = bytearray(BLOCK), time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begun


def write_once(folder: Path, nbytes: int) -> float:
    """Seconds to write and sync so many random bytes."""
    block, begun = os.urandom(BLOCK), time.perf_counter()
    path = folder / "written-once"
    with path.open("wb", buffering=0) as file:
        for start in range(0, nbytes, BLOCK):
            file.write(block[: min(BLOCK, nbytes - start)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


def measure(case: Case, folder: Path) -> Cost:
    """Reads, builds, removes the engine and writes as much. Raises SystemExit when the build fails."""
    files = weight_files(case.model)
    read_seconds = read_once(files)
    output = folder / "engine"
    arguments = [*COMMAND, str(case.model), "--output-dir", str(output), "--target", case.target, "--json", "--quiet"]
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as stdout:
        process = subprocess.Popen([*arguments, "--quantization", case.quantization], stdout=stdout)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        result = json.loads(stdout.read() or b"{}")
    if process.returncode:
        raise SystemExit(f"{case.name}: trtllm-build ended with {process.returncode}: {result.get('error')}")
    shutil.rmtree(output)
    return Cost(
        model=case.name,
        target=case.target,
        quantization=case.quantization,
        source_bytes=sum(path.stat().st_size for path in files),
        engine_bytes=result["engine_bytes"],
        seconds=seconds,
        peak_memory=usage.ru_maxrss * 1024,
        planned_memory=result["plan"]["peak_memory"],
        read_seconds=read_seconds,
        write_seconds=write_once(folder, result["engine_bytes"]),
    )


def table(costs: Iterable[Cost]) -> Iterator[str]:
    """Rows of a markdown table."""
    yield "| model | target | quantization | source | engine | seconds | peak | planned | read + write once | ratio |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for cost in costs:
        once = f"{cost.read_seconds:.1f} + {cost.write_seconds:.1f} s"
        yield (
            f"| {cost.model} | {cost.target} | {cost.quantization} | {cost.source_bytes / 1e9:.2f} GB "
            f"| {cost.engine_bytes / 1e9:.2f} GB | {cost.seconds:.1f} | {cost.peak_memory / 1e6:.0f} MB "
            f"| {cost.planned_memory / 1e6:.0f} MB | {once} | {cost.ratio:.2f} |"
        )


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """Every combination; a synthetic checkpoint exists only while its cases are measured."""
    for model in arguments.models:
        yield from _cases_of(arguments, model.name, model)
    for layers in (arguments.layers or [None]) if arguments.synthetic else []:
        name = f"{arguments.synthetic}{f', {layers} layers' if layers else ''}"
        model = folder / "synthetic"
        maker = Path(__file__).parents[1] / "tools" / "dev" / "make_synthetic.py"
        made = [sys.executable, str(maker), arguments.synthetic, str(model)]
        subprocess.run(made + (["--layers", str(layers)] if layers else []), check=True, stdout=sys.stderr)
        yield from _cases_of(arguments, name, model)
        shutil.rmtree(model)


def _cases_of(arguments: argparse.Namespace, name: str, model: Path) -> Iterator[Case]:
    for target in arguments.targets:
        for quantization in arguments.quantizations:
            yield Case(name, model, target, quantization)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="*", metavar="MODEL")
    parser.add_argument("--synthetic", metavar="PRESET", help="make a checkpoint with tools/dev/make_synthetic.py")
    parser.add_argument("--layers", type=int, nargs="+", help="numbers of layers of the synthetic checkpoint")
    parser.add_argument("--targets", nargs="+", default=["onnxruntime"])
    parser.add_argument("--quantizations", nargs="+", default=["none", "W8A16", "W4A16"])
    parser.add_argument("--folder", type=Path, help="where engines are written; a temporary folder when left out")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    costs = []
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="build-cost-") as folder:
        for case in cases(arguments, Path(folder)):
            costs.append(measure(case, Path(folder)))
            print(list(table(costs[-1:]))[-1], file=sys.stderr)
    print("\n".join(table(costs)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
