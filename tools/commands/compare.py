"""`trtllm-compare ENGINE MODEL`: parses; `trtllm.compiler.inspection.comparison` runs both."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from trtllm.tools.command_line import Action, run
from trtllm.tools.compare_request import CompareRequest

NAME = "trtllm-compare"
EPILOG = """\b
Exit codes: 0 no layer diverges; 1 one does, or a defect of this tool (then stderr says so); 2 usage; 3 not supported;
4 another model, or damaged files; 5 target's library missing; 6 not enough memory or disk; 130 interrupted;
143 terminated.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
Text = str | None


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110})
def compare(
    engine: Annotated[Text, typer.Argument(metavar="ENGINE", show_default=False, help="An engine directory.")] = None,
    model: Annotated[
        Text, typer.Argument(metavar="MODEL", show_default=False, help="The model it was built from.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="A prompt; may be given again.")] = None,
    dataset: Annotated[
        Text, typer.Option(metavar="FILE", help="Text: JSON lines or plain.", show_default="built in")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of that text.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 128,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Relative RMS at which a layer diverges.", show_default="what rounding explains"),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Threads; 0: all cores.")] = 0,
    log_level: Annotated[str, typer.Option(help="debug (with tracebacks), info, warning, error.")] = "info",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only; the exit code says the rest.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")] = False,
) -> Action:
    """Hold an engine against its model in full precision: logits, and layer by layer where the two part.

    trtllm-compare ./engine ./model --prompt "The capital of France is"
    """
    return CompareRequest.checked(
        NAME, engine, model, tuple(prompt or ()), dataset, rows, length, tolerance, workers, log_level, quiet=quiet
    ).perform


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run(app, NAME, arguments)


if __name__ == "__main__":
    sys.exit(main())
