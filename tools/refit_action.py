"""What trtllm-refit was asked for, checked, and carried out: the report, then the refit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from trtllm.errors import UsageError
from trtllm.tools.console import LEVELS, Console


@dataclass(frozen=True)
class RefitRequest:
    """A refit as a command line asks for it."""

    engine: Path
    model: str | None
    output_dir: Path | None
    in_place: bool
    base: str | None
    strength: float
    partial: bool
    revert: bool
    recalibrate: bool
    verify: bool
    threads: int
    dry_run: bool
    log_level: str

    @classmethod
    def checked(
        cls, *, engine: str | None, model: str | None, engine_dir: str | None, checkpoint_dir: str | None,
        output_dir: Path | None, in_place: bool, base: str | None, strength: float, partial: bool, revert: bool,
        recalibrate: bool, verify: bool, threads: int, dry_run: bool, log_level: str,
    ) -> RefitRequest:  # fmt: skip
        """Raises UsageError for what is missing or contradicts itself."""
        if engine_dir is not None and engine is not None and model is None:
            engine, model = None, engine  # the one positional argument is the model
        chosen, source = engine or engine_dir, model or checkpoint_dir
        if not chosen:
            raise UsageError("no engine is given", "trtllm-refit ENGINE MODEL; --help lists the options")
        if engine and engine_dir and engine != engine_dir:
            raise UsageError(f"two engines are given: {engine} and {engine_dir}", "refit one at a time")
        if model and checkpoint_dir and model != checkpoint_dir:
            raise UsageError(f"two models are given: {model} and {checkpoint_dir}", "give one")
        if not source and not revert:
            raise UsageError("no model is given", "trtllm-refit ENGINE MODEL, or --revert --base MODEL")
        if in_place and output_dir is not None:
            raise UsageError("--in-place and --output-dir exclude each other", "give one of them")
        if not 0 <= strength <= 10:
            raise UsageError(f"--strength {strength:g} is out of range", "0 is the base, 1 the adapter")
        if log_level not in LEVELS:
            raise UsageError(f"unknown log level '{log_level}'", f"levels: {', '.join(LEVELS)}")
        return cls(
            Path(chosen), source, output_dir, in_place, base, strength, partial, revert, recalibrate, verify, threads,
            dry_run, log_level,
        )  # fmt: skip

    def perform(self, console: Console) -> int:
        """Prints the report, and refits unless it is a dry run; raises what the library raises."""
        from trtllm.compiler.engine import check_free, open_engine
        from trtllm.compiler.refit.refit import RefitOptions, finish_refit, prepare_refit
        from trtllm.tools.progress_display import display_for

        begun = time.monotonic()
        console.level = self.log_level
        options = RefitOptions(
            self.base, self.strength, self.partial, self.revert, self.recalibrate, self.verify, self.threads
        )
        refitted = None
        with display_for(console) as display:
            engine = open_engine(self.engine, verify=False)
            target = engine.path if self.in_place else self.output_dir or Path(f"{str(engine.path).rstrip('/')}.refit")
            if not self.in_place:
                check_free(target.absolute())
            prepared = prepare_refit(engine, self.model, options=options, progress=display)
            report = prepared.report
            if self.dry_run and console.level in ("debug", "info"):
                for line in report.lines():
                    console.say(line)
            if not self.dry_run or not console.json_output:
                report.check()
            if not self.dry_run:
                refitted = finish_refit(prepared, target, in_place=self.in_place, progress=display)
        seconds = time.monotonic() - begun
        verification = refitted.verification if refitted is not None else None
        if refitted is not None and console.level in ("debug", "info"):
            count = f"{len(report.changed_weights)} of {report.weights} weights"
            console.say(f"refitted {target}: {count} from {report.source} in {seconds:.1f} s")
            for note in report.notes:
                console.say(f"  {note}")
            if verification is not None:
                console.say(f"  {verification.line()}")
        console.result(
            {
                "command": "trtllm-refit",
                "refitted": refitted is not None,
                "output_dir": str(target),
                "seconds": round(seconds, 3),
                "verification": verification.to_json() if verification is not None else None,
                "report": report.to_json(),
            }
        )
        return 4 if report.problems else 0
