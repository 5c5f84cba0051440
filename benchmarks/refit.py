"""What a refit costs, beside reading the new weights once and writing the engine's weights once.

    python benchmarks/refit.py MODEL TUNED [--engines none/float32 none/float16 W8A16 W4A16] [--repeats 5] [--cold]

MODEL is built once for each engine; then, in turns, every engine is refitted to TUNED and its floor is measured:
reading TUNED's weight files from front to back, and writing and syncing as many bytes as the engine's weights file has.
With --cold TUNED's files are dropped from the page cache before each reading, the floor's and the refit's. "refit" is
the library call without verification in a process that is up, from opening the engine until the new one is synced and
in its place; "verified" is the same with it; "command" is `trtllm-refit` with everything, Python's start included. On a
machine that does other work, `nice -n -15` keeps that away from both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from build_cost import read_once, weight_files, write_once
from machine import describe_machine

from trtllm.compiler.engine import WEIGHTS, open_engine
from trtllm.compiler.pipeline import compile as compile_engine
from trtllm.compiler.refit.refit import RefitOptions, refit_engine

COMMAND = [sys.executable, "-m", "trtllm.tools.commands.refit"]


@dataclass
class Seconds:
    """One engine's measurements, one of each kind a turn."""

    engine: str
    source_bytes: int
    weights_bytes: int
    read: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    refit: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    """Of the refit, user and system, all threads."""
    verified: list[float] = field(default_factory=list)
    command: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The refit's median against those of the two parts of the floor."""
        return statistics.median(self.refit) / (statistics.median(self.read) + statistics.median(self.write))


class Bench:
    """Engines of one model, refitted in turns."""

    def __init__(self, model: Path, tuned: Path, folder: Path, *, cold: bool) -> None:
        self.model, self.tuned, self.folder, self.cold = model, tuned, folder, cold

    def build(self, name: str) -> Seconds:
        quantization, _, dtype = name.partition("/")
        engine = compile_engine(
            self.model, output_dir=self._engine(name), max_seq_len=512, max_batch_size=1,
            quantization=None if quantization == "none" else quantization, dtype=dtype or None,
        )  # fmt: skip
        source = sum(path.stat().st_size for path in weight_files(self.tuned))
        return Seconds(name, source, (engine.path / WEIGHTS).stat().st_size)

    def turn(self, seconds: Seconds, *, extra: bool) -> None:
        """Floor and refit once; with `extra` also the verified refit and the command."""
        self._settle()
        seconds.read.append(read_once(weight_files(self.tuned)))
        seconds.write.append(write_once(self.folder, seconds.weights_bytes))
        elapsed, cpu = self._refit(seconds.engine, verify=False)
        seconds.refit.append(elapsed)
        seconds.cpu.append(cpu)
        if extra:
            seconds.verified.append(self._refit(seconds.engine, verify=True)[0])
            seconds.command.append(self._command(seconds.engine))

    def _refit(self, name: str, *, verify: bool) -> tuple[float, float]:
        self._settle()
        before, begun = os.times(), time.perf_counter()
        made = refit_engine(
            self._engine(name), self.tuned, self.folder / "refitted", options=RefitOptions(verify=verify)
        )
        elapsed, after = time.perf_counter() - begun, os.times()
        assert open_engine(made.engine.path, verify=False).manifest.weights
        shutil.rmtree(made.engine.path)
        return elapsed, after.user + after.system - before.user - before.system

    def _command(self, name: str) -> float:
        self._settle()
        arguments = [str(self._engine(name)), str(self.tuned), "--output-dir", str(self.folder / "refitted"), "--quiet"]
        begun = time.perf_counter()
        subprocess.run([*COMMAND, *arguments], check=True)
        elapsed = time.perf_counter() - begun
        shutil.rmtree(self.folder / "refitted")
        return elapsed

    def _settle(self) -> None:
        """Cold files are not in memory."""
        for path in weight_files(self.tuned) if self.cold else []:
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def _engine(self, name: str) -> Path:
        return self.folder / name.replace("/", "-")


def table(results: list[Seconds]) -> Iterator[str]:
    """Rows of a markdown table: medians."""
    yield "| engine | source | weights | read | write | refit | ratio | refit's CPU | verified | command |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for one in results:
        read, write, refit, cpu = (statistics.median(values) for values in (one.read, one.write, one.refit, one.cpu))
        extra = [f"{statistics.median(values):.2f} s" if values else "" for values in (one.verified, one.command)]
        yield (
            f"| {one.engine} | {one.source_bytes / 1e6:.0f} MB | {one.weights_bytes / 1e6:.0f} MB | {read:.2f} s "
            f"| {write:.2f} s | {refit:.2f} s | {one.ratio:.2f} | {cpu:.2f} s | {extra[0]} | {extra[1]} |"
        )


def main() -> None:
    """Build, measure in turns, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tuned", type=Path)
    parser.add_argument("--engines", nargs="+", default=["none/float32", "none/float16", "W8A16", "W4A16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--extra", type=int, default=1, help="turns that also measure verification and the command")
    parser.add_argument(
        "--cold", action="store_true", help="drop TUNED's files from the page cache before each reading"
    )
    parser.add_argument("--folder", type=Path, help="where engines are written; a temporary folder when left out")
    parser.add_argument("--wait-for", type=Path, help="after building, begin only when this file exists")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="refit-") as folder:
        bench = Bench(arguments.model, arguments.tuned, Path(folder), cold=arguments.cold)
        results = [bench.build(name) for name in arguments.engines]
        while arguments.wait_for and not arguments.wait_for.exists():
            time.sleep(0.5)
        for repeat in range(arguments.repeats):
            for one in results:
                bench.turn(one, extra=repeat < arguments.extra)
    print("\n".join(table(results)))
    if arguments.json:
        data = {"machine": describe_machine(), "cold": arguments.cold, "results": [asdict(one) for one in results]}
        arguments.json.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
