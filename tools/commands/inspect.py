"""`trtllm-inspect PATH`: parses; `trtllm.compiler.inspection.contents` reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trtllm.errors import UsageError
from trtllm.tools.command_line import Action, run
from trtllm.tools.inspect_request import InspectRequest

NAME = "trtllm-inspect"
EPILOG = """\b
Exit codes: 0 inspected; 1 a defect of this tool; 2 usage; 3 not supported; 4 damaged files;
6 not enough memory or disk; 130 interrupted; 143 terminated.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
Text = str | None


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110})
def inspect(
    path: Annotated[
        Text, typer.Argument(metavar="PATH", show_default=False, help="An engine, or any model that a build takes.")
    ] = None,
    weights: Annotated[bool, typer.Option("--weights", help="List every weight.")] = False,
    recipes: Annotated[bool, typer.Option("--recipes", help="List what each weight is made of.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="List every operator, inputs and outputs.")] = False,
    reference: Annotated[
        Text, typer.Option(metavar="MODEL", help="The model an engine was built from: measures its quantization.")
    ] = None,
    hashes: Annotated[bool, typer.Option("--hashes", help="Read a checkpoint's tensors to hash them.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one self-contained page; FILE must not exist.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug (with tracebacks), info, warning, error.")] = "info",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")] = False,
) -> Action:
    """Say what is in an engine, a checkpoint or a GGUF file: weights, recipes, graph, memory, versions, state.

    trtllm-inspect ./engine --html engine.html --reference ./model
    """
    if not path:
        raise UsageError("nothing to inspect is given", f"{NAME} PATH; --help lists the options")
    return InspectRequest(NAME, path, weights, recipes, graph, reference, hashes, html, quiet, log_level).perform


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run(app, NAME, arguments)


if __name__ == "__main__":
    sys.exit(main())
