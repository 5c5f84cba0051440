"""`trtllm-refit --engine-dir E --checkpoint-dir MODEL`: parses; `trtllm.compiler.refit` does the work."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trtllm.tools.command_line import Action, run
from trtllm.tools.refit_action import RefitRequest

NAME = "trtllm-refit"
EPILOG = """\b
Every option is also taken with underscores (--engine_dir).
Exit codes: 0 refitted; 1 a defect of this tool; 2 usage; 3 not supported; 4 the weights do not fit, or damaged files;
5 target's library missing or refused; 6 not enough memory or disk; 130 interrupted; 143 terminated.
A refit that does not succeed leaves nothing behind, and the engine as it was.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
Text = str | None


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110})
def refit(
    engine: Annotated[Text, typer.Argument(metavar="ENGINE", help="The engine directory.", show_default=False)] = None,
    model: Annotated[
        Text,
        typer.Argument(
            metavar="MODEL",
            help="What trtllm-build takes, a safetensors file of some tensors, or a PEFT LoRA directory.",
            show_default=False,
        ),
    ] = None,
    engine_dir: Annotated[Text, typer.Option("--engine-dir", help="Same as ENGINE.")] = None,
    checkpoint_dir: Annotated[Text, typer.Option("--checkpoint-dir", "--model-dir", help="Same as MODEL.")] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="The engine that is made; it must not exist.", show_default="ENGINE.refit")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Exchange ENGINE for the new one, in one step.")] = False,
    base: Annotated[
        Text,
        typer.Option(metavar="MODEL", help="Base of an adapter, rest of a partial checkpoint, target of --revert."),
    ] = None,
    strength: Annotated[float, typer.Option(help="Of a LoRA adapter: 0 is the base, 1 the adapter.")] = 1.0,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take what the checkpoint has; other weights stay the engine's.")
    ] = False,
    revert: Annotated[bool, typer.Option("--revert", help="Back to the weights of the build, from --base.")] = False,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Calibrate the new weights, where the engine's scheme needs it.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with the checkpoint's own graph before it appears.")
    ] = True,
    workers: Annotated[int, typer.Option(min=0, help="Threads that quantize and convert; 0: all cores.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the report and write nothing.")] = False,
    log_level: Annotated[str, typer.Option(help="debug (with tracebacks), info, warning, error.")] = "info",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")] = False,
) -> Action:
    """Put other weights of the same model into an engine, without building it again.

    trtllm-refit --engine-dir engine --checkpoint-dir ./my-fine-tune
    """
    request = RefitRequest.checked(
        engine=engine, model=model, engine_dir=engine_dir, checkpoint_dir=checkpoint_dir, output_dir=output_dir,
        in_place=in_place, base=base, strength=strength, partial=partial, revert=revert, recalibrate=recalibrate,
        verify=verify, threads=workers, dry_run=dry_run, log_level="error" if quiet else log_level,
    )  # fmt: skip
    return request.perform


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run(app, NAME, arguments)


if __name__ == "__main__":
    sys.exit(main())
