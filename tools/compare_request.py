"""What a `trtllm-compare` command line asks for, checked; carrying it out loads the library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm.errors import UsageError
from trtllm.tools.console import Console, checked_level

if TYPE_CHECKING:
    from trtllm.compiler.inspection.comparison import Comparison


@dataclass(frozen=True)
class CompareRequest:
    """One run of the command."""

    command: str
    engine: str
    model: str
    prompts: tuple[str, ...]
    dataset: str | None
    rows: int
    length: int
    tolerance: float | None
    threads: int
    quiet: bool
    log_level: str

    @classmethod
    def checked(
        cls, command: str, engine: str | None, model: str | None, prompts: tuple[str, ...], dataset: str | None,
        rows: int, length: int, tolerance: float | None, threads: int, log_level: str, *, quiet: bool,
    ) -> CompareRequest:  # fmt: skip
        """Raises UsageError for what is missing or contradicts itself."""
        if not engine or not model:
            raise UsageError("an engine and a model are needed", f"{command} ENGINE MODEL; --help lists the options")
        if prompts and dataset is not None:
            raise UsageError("--prompt and --dataset exclude each other", "give one of them")
        return cls(command, engine, model, prompts, dataset, rows, length, tolerance, threads, quiet, log_level)

    def perform(self, console: Console) -> int:
        """Runs both and prints what came of it: 0, or 1 when a layer diverges; raises what the library raises."""
        from trtllm.compiler.engine import open_engine
        from trtllm.compiler.inspection.comparison import ComparisonText, compare
        from trtllm.frontends.detect import open_model
        from trtllm.tools.progress_display import display_for

        console.level = checked_level(self.log_level, quiet=self.quiet)
        text = ComparisonText(self.prompts, self.dataset, self.rows, self.length)
        with display_for(console) as display:
            engine = open_engine(Path(self.engine), verify=False)
            checkpoint = open_model(self.model, notify=display.note)
            found = compare(engine, checkpoint, text, display, tolerance=self.tolerance, threads=self.threads)
        if not self.quiet:
            for line in lines(found):
                console.say(line)
        console.result({"command": self.command, **found.to_json()})
        return 0 if found.first_diverging is None else 1


def lines(found: Comparison) -> Iterator[str]:
    """The comparison for people."""
    yield f"{found.engine} against {found.model} in float32: {found.tokens} tokens in {found.rows} rows"
    yield f"logits of {found.logits} tokens: KL {found.divergence:.3g} nats, max error {found.max_error:.3g}"
    yield f"same likeliest token: {found.agreement:.2%}"
    width = max((len(place.name) for place in found.places), default=0)
    yield f"{'what goes into':<{width}}  {'from':<10}  relative rms  tolerance  max error"
    for place in found.places:
        origin = "embedding" if place.layer is None else f"layer {place.layer}"
        mark = "  DIVERGES" if place.diverges else ""
        yield (
            f"{place.name:<{width}}  {origin:<10}  {place.relative_rms:>12.3g}  {place.tolerance:>9.3g}  "
            f"{place.max_error:>9.3g}{mark}"
        )
    first = found.first_diverging
    if first is None:
        yield "no layer diverges"
    else:
        origin = "the embedding" if first.layer is None else f"layer {first.layer}"
        yield f"first diverging: {origin}, in what goes into {first.name}"
