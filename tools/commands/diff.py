"""`trtllm-diff A B`: parses; `trtllm.compiler.inspection.difference` compares."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from trtllm.errors import UsageError
from trtllm.tools.command_line import Action, run
from trtllm.tools.console import Console, checked_level
from trtllm.tools.diff_report import lines

NAME = "trtllm-diff"
EPILOG = """\b
Exit codes: 0 equal; 1 different, or a defect of this tool (then stderr says so); 2 usage; 3 not supported;
4 damaged files; 6 not enough memory or disk; 130 interrupted; 143 terminated.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110})
def diff(
    a: Annotated[str | None, typer.Argument(metavar="A", show_default=False, help="A checkpoint or an engine.")] = None,
    b: Annotated[str | None, typer.Argument(metavar="B", show_default=False, help="Another one.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="List every difference, not only the first forty.")] = False,
    log_level: Annotated[str, typer.Option(help="debug (with tracebacks), info, warning, error.")] = "info",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only; the exit code says the rest.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")] = False,
) -> Action:
    """Say in what two checkpoints or engines differ: configuration, files, and tensor by tensor.

    trtllm-diff ./engine ./engine.refit
    """
    if not a or not b:
        raise UsageError("two checkpoints or engines are needed", f"{NAME} A B; --help lists the options")
    left, right = a, b

    def perform(console: Console) -> int:
        from trtllm.compiler.inspection.difference import difference
        from trtllm.tools.progress_display import display_for

        console.level = checked_level(log_level, quiet=quiet)
        with display_for(console) as display:
            found = difference(left, right, display)
        if not quiet:
            for line in lines(found, limit=None if all_ else 40):
                console.say(line)
        console.result({"command": NAME, **found.to_json()})
        return 0 if found.is_equal else 1

    return perform


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run(app, NAME, arguments)


if __name__ == "__main__":
    sys.exit(main())
