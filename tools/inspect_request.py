"""What a `trtllm-inspect` command line asks for, as a value; carrying it out loads the library."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from trtllm.errors import UsageError
from trtllm.tools.console import Console, checked_level

_PIPED_WIDTH = 160
"""Characters of a line where nobody says how wide the output is."""


@dataclass(frozen=True)
class InspectRequest:
    """One run of the command."""

    command: str
    path: str
    weights: bool
    recipes: bool
    graph: bool
    reference: str | None
    hashes: bool
    html: Path | None
    quiet: bool
    log_level: str = "info"

    def perform(self, console: Console) -> int:
        """Inspects, prints, and writes the page when one is wanted; raises what the library raises."""
        from trtllm.compiler.inspection.contents import inspect
        from trtllm.compiler.inspection.page import page
        from trtllm.tools.progress_display import display_for

        if self.html is not None and self.html.exists():
            raise UsageError(f"{self.html} exists", "choose another file, or remove it first")
        if self.html is not None and not self.html.absolute().parent.is_dir():
            raise UsageError(f"there is no directory {self.html.absolute().parent}", "make it, or choose another place")
        level = checked_level(self.log_level, quiet=self.quiet)
        console.level = "warning" if level == "info" else level
        with display_for(console) as display:
            found = inspect(self.path, display, reference=self.reference, hashes=self.hashes)
        if self.html is not None:
            _write(self.html, page(found))
        if not self.quiet:
            self._print(found, console)
        console.result({"command": self.command, **found.to_json()})
        return 0

    def _print(self, found: object, console: Console) -> None:
        from rich.console import Console as RichConsole

        from trtllm.compiler.inspection.contents import Contents
        from trtllm.tools.inspect_report import print_contents

        assert isinstance(found, Contents)
        if console.json_output:
            return
        width = None if sys.stdout.isatty() else max(_PIPED_WIDTH, shutil.get_terminal_size().columns)
        rich = RichConsole(file=sys.stdout, width=width, soft_wrap=False)
        print_contents(found, rich, weights=self.weights, recipes=self.recipes, graph=self.graph)
        if self.html is not None:
            console.say(f"page: {self.html}")


def _write(file: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    partial = file.with_name(f".{file.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
