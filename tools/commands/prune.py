"""`trtllm-prune PATH --output-dir DIR`: takes weights out of a checkpoint or an engine, or puts them back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trtllm.errors import UsageError
from trtllm.tools.command_line import Action, run
from trtllm.tools.prune_request import PruneRequest, RewriteRequest

NAME = "trtllm-prune"
EPILOG = """\b
Every option is also taken with underscores (--checkpoint_dir, --prune_all).
Without --method, --layers, --heads or --mlp-channels nothing is lost: --restore, or trtllm-refit, puts it back.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Text = str | None


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110})
def prune(
    path: Annotated[Text, typer.Argument(metavar="PATH", help="A checkpoint or an engine directory.")] = None,
    checkpoint_dir: Annotated[Text, typer.Option("--checkpoint-dir", help="Same as PATH.")] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "--out-dir", help="The directory that is made.", show_default="PATH.pruned"),
    ] = None,
    prune_all: Annotated[
        bool, typer.Option("--prune-all", help="All tensors, not only the matrices of the layers.")
    ] = False,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only tensors of such names.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="No tensors of such names.")] = None,
    restore: Annotated[
        Text, typer.Option(metavar="SOURCE", help="Put back what was taken out, from a checkpoint or an engine.")
    ] = None,
    method: Annotated[Text, typer.Option(help="Make weights zero: magnitude, or wanda (by the text's inputs).")] = None,
    sparsity: Annotated[float | None, typer.Option(help="The share of zeros.", show_default="0.5")] = None,
    structure: Annotated[Text, typer.Option(metavar="N:M", help="N of each M inputs stay: 2:4.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads of a layer that stay.")] = None,
    mlp_channels: Annotated[int | None, typer.Option(help="Channels of an MLP that stay.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers that stay.")] = None,
    calib_dataset: Annotated[
        Text, typer.Option(metavar="FILE", help="Text to measure on: JSON lines or plain.", show_default="built in")
    ] = None,
    eval_dataset: Annotated[
        Text, typer.Option(metavar="FILE", help="Text to score instead of the end of that one.")
    ] = None,
    format: Annotated[str, typer.Option(help="Of a model with less in it: huggingface or trtllm.")] = "huggingface",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be taken out, and stop.")] = False,
    log_level: Annotated[str, typer.Option(help="debug (with tracebacks), info, warning, error.")] = "info",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")] = False,
) -> Action:
    """Take the weights out of a checkpoint or an engine, remembering their hashes; or make a model smaller for good.

    trtllm-prune ./checkpoint --output-dir checkpoint.pruned

    trtllm-prune ./model --output-dir smaller --layers 24
    """
    if path is not None and checkpoint_dir is not None and path != checkpoint_dir:
        raise UsageError(f"two directories are given: {path} and {checkpoint_dir}", "prune one at a time")
    chosen = path or checkpoint_dir
    if not chosen:
        raise UsageError("no checkpoint or engine is given", f"{NAME} PATH --output-dir DIR; --help lists the options")
    if restore is not None and (prune_all or include or exclude or dry_run):
        raise UsageError("--restore puts back everything", "leave out --prune-all, --include, --exclude and --dry-run")
    request = PruneRequest(
        command=NAME,
        path=Path(chosen),
        output_dir=output_dir,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        prune_all=prune_all,
        restore=restore,
        dry_run=dry_run,
        quiet=quiet,
        log_level=log_level,
        rewrite=RewriteRequest.of(
            method, sparsity, structure, heads, mlp_channels, layers, calib_dataset, eval_dataset, format
        ),
    )
    return request.perform


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run(app, NAME, arguments)


if __name__ == "__main__":
    sys.exit(main())
