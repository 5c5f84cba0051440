"""`trtllm-convert MODEL --output-dir DIR`: writes a model in the project's checkpoint format."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trtllm.errors import UsageError
from trtllm.tools.command_line import Action, run
from trtllm.tools.console import Console

NAME = "trtllm-convert"
EPILOG = """\b
Every option is also taken with underscores (--output_dir).
The checkpoint keeps the model's precision; trtllm-build quantizes.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110})
def convert(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A Hugging Face directory or hub id, or a GGUF file.")
    ] = None,
    model_dir: Annotated[str | None, typer.Option("--model-dir", help="Same as MODEL.")] = None,
    output_dir: Annotated[Path, typer.Option(help="The directory that is made; it must not exist.")] = Path(
        "tllm_checkpoint"
    ),
    dtype: Annotated[str, typer.Option(help="auto (as the model is), float32, float16, bfloat16.")] = "auto",
    tp_size: Annotated[int, typer.Option(help="Ranks that share each tensor.")] = 1,
    pp_size: Annotated[int, typer.Option(help="Stages that share the layers.")] = 1,
    use_parallel_embedding: Annotated[
        bool, typer.Option("--use-parallel-embedding", help="The ranks share the embedding too, by its rows.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Threads that convert; 0: all cores.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")] = False,
) -> Action:
    """Convert a published model to a checkpoint of config.json and rankN.safetensors.

    trtllm-convert ./Llama-3.2-1B --output-dir checkpoint --tp-size 2
    """
    if model is not None and model_dir is not None and model != model_dir:
        raise UsageError(f"two models are given: {model} and {model_dir}", "convert one at a time")
    chosen = model or model_dir
    if not chosen:
        raise UsageError("no model is given", f"{NAME} MODEL --output-dir DIR; --help lists the options")

    def perform(console: Console) -> int:
        from trtllm.compiler.conversion import convert_model
        from trtllm.sizes import format_size
        from trtllm.tools.progress_display import display_for

        console.level = "error" if quiet else console.level
        with display_for(console) as display:
            made = convert_model(
                chosen,
                output_dir,
                dtype=dtype,
                tp_size=tp_size,
                pp_size=pp_size,
                parallel_embedding=use_parallel_embedding,
                threads=workers,
                progress=display,
            )
        if not quiet:
            ranks = made.mapping.world_size
            console.say(
                f"{made.path}: {made.architecture}, {ranks} rank{'s' * (ranks > 1)}, {format_size(made.nbytes)}"
            )
        console.result({"command": NAME, "output_dir": str(made.path), **made.to_json()})
        return 0

    return perform


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run(app, NAME, arguments)


if __name__ == "__main__":
    sys.exit(main())
