"""`trtllm-build MODEL --output-dir DIR`: parses a build request; `tools.build_action` carries it out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from trtllm.tools.build_request import BUILD_FIELDS, BuildRequest
from trtllm.tools.command_line import Action, run
from trtllm.tools.retired_flags import RETIRED

NAME = "trtllm-build"
EPILOG = """\b
Every option is also taken with underscores (--max_batch_size).
Exit codes: 0 built; 1 a defect of this tool; 2 usage; 3 model, dtype or quantization not supported;
4 bad input files; 5 target's library missing or refused; 6 not enough memory or disk;
130 interrupted; 143 terminated. A build that does not succeed leaves nothing behind.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Text = str | None
Number = int | None
Flag = bool | None


def _show_version(*, wanted: bool) -> None:
    if wanted:
        from trtllm import __version__

        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110})
def build(
    context: typer.Context,
    model: Annotated[
        Text,
        typer.Argument(metavar="MODEL", help="A Hugging Face directory or hub id, or a GGUF file.", show_default=False),
    ] = None,
    checkpoint_dir: Annotated[Text, typer.Option("--checkpoint-dir", "--model-dir", help="Same as MODEL.")] = None,
    output_dir: Annotated[Path, typer.Option(help="The engine directory that is made; it must not exist.")] = Path(
        "engine_outputs"
    ),
    target: Annotated[Text, typer.Option(help="onnxruntime (any CPU) or tensorrt.", show_default="onnxruntime")] = None,
    dtype: Annotated[
        Text, typer.Option(help="auto (the target's best), float32, float16, bfloat16.", show_default="auto")
    ] = None,
    quantization: Annotated[
        Text,
        typer.Option(
            "--quantization",
            "-q",
            help="W8A16, W4A16, W4A16_AWQ, W4A16_GPTQ, W8A16_GPTQ, MIXED_PRECISION.",
            show_default="none",
        ),
    ] = None,
    kv_cache_quant_algo: Annotated[
        Text,
        typer.Option(
            "--kv-cache-dtype",
            "--kv-cache-quant-algo",
            help="Of stored keys and values: auto, int8, fp8.",
            show_default="auto",
        ),
    ] = None,
    dequantize: Annotated[
        Flag,
        typer.Option("--dequantize/--no-dequantize", help="Full precision of a checkpoint that is stored quantized."),
    ] = None,
    weight_scales: Annotated[
        Text,
        typer.Option(help="Of 4-bit blocks: absmax, or search (least squared error).", show_default="the scheme's"),
    ] = None,
    has_zero_point: Annotated[
        Flag,
        typer.Option(
            "--has-zero-point/--no-zero-point",
            help="4-bit blocks have a minimum beside their scale: 5 bits a weight instead of 4.5.",
            show_default="the scheme's",
        ),
    ] = None,
    activation_bits: Annotated[
        Number,
        typer.Option(
            help="8, or 16: what decoders round activations to before they multiply by integers in blocks.",
            show_default="8",
        ),
    ] = None,
    exclude_modules: Annotated[
        Text, typer.Option(metavar="PATTERNS", help="Layers kept in full precision: lm_head,*.v_proj.")
    ] = None,
    quantized_layers: Annotated[
        Text, typer.Option(metavar="PATTERN=SCHEME,...", help="Layers of other schemes: *.v_proj=W8A16.")
    ] = None,
    quantization_bits: Annotated[
        float | None, typer.Option(help="MIXED_PRECISION: average bits per weight of the linear layers, such as 5.0.")
    ] = None,
    group_size: Annotated[Number, typer.Option(help="Weights that share a scale.", show_default="32")] = None,
    calib_dataset: Annotated[
        Text, typer.Option(metavar="FILE", help="JSON lines with a text field, or plain text.", show_default="built in")
    ] = None,
    calib_size: Annotated[Number, typer.Option(help="Samples of calibration text.", show_default="64")] = None,
    calib_max_seq_length: Annotated[Number, typer.Option(help="Tokens of a sample.", show_default="512")] = None,
    calib_inputs: Annotated[
        Text,
        typer.Option(help="A layer sees what quantized or full layers before it make.", show_default="quantized"),
    ] = None,
    calib_dir: Annotated[
        Text, typer.Option(metavar="DIR", help="Keeps a calibration's progress.", show_default="the user's cache")
    ] = None,
    optimization_level: Annotated[
        Number, typer.Option("--optimization-level", "-O", help="-O0, -O1 or -O2: how much is fused.", show_default="2")
    ] = None,
    max_batch_size: Annotated[Number, typer.Option(help="Sequences at once.", show_default="8")] = None,
    max_input_len: Annotated[Number, typer.Option(help="Tokens of a prompt.", show_default="max-seq-len")] = None,
    max_seq_len: Annotated[
        Number,
        typer.Option(
            "--max-seq-len",
            "--max-decoder-seq-len",
            help="Tokens of a prompt and its answer.",
            show_default="the model's positions, at most 8192",
        ),
    ] = None,
    max_num_tokens: Annotated[Number, typer.Option(help="Tokens of a step.", show_default="8192")] = None,
    opt_batch_size: Annotated[Number, typer.Option(help="The batch size to tune for.")] = None,
    opt_num_tokens: Annotated[Number, typer.Option(help="The tokens of a step to tune for.")] = None,
    gather_context_logits: Annotated[
        Flag,
        typer.Option("--gather-context-logits/--no-gather-context-logits", help="Logits of every prompt token."),
    ] = None,
    logits_dtype: Annotated[Text, typer.Option(help="float32.", show_default="float32")] = None,
    pooling: Annotated[
        Text, typer.Option(help="Of an encoder: auto, mean, cls, last, none.", show_default="auto")
    ] = None,
    normalize_embeddings: Annotated[
        Flag,
        typer.Option(
            "--normalize-embeddings/--no-normalize-embeddings",
            help="Embeddings of length 1.",
            show_default="as published",
        ),
    ] = None,
    strip_plan: Annotated[
        Flag, typer.Option("--strip-plan/--no-strip-plan", help="An engine without its weights, for trtllm-refit.")
    ] = None,
    weight_streaming: Annotated[
        Flag,
        typer.Option("--weight-streaming/--no-weight-streaming", help="TensorRT: weights may stay on the host."),
    ] = None,
    profiling_verbosity: Annotated[
        Text,
        typer.Option(help="TensorRT: layer_names_only, detailed, none.", show_default="layer_names_only"),
    ] = None,
    builder_optimization_level: Annotated[
        Number, typer.Option(help="TensorRT: 0 (quick) to 5 (thorough).", show_default="the library's")
    ] = None,
    compute_capabilities: Annotated[
        Text, typer.Option(help="TensorRT: GPUs to build for, such as 86,89.", show_default="the library's")
    ] = None,
    tensorrt_workspace_mb: Annotated[
        Number, typer.Option(help="TensorRT: MB that a plan may compute with beside its weights.", show_default="all")
    ] = None,
    tensorrt_version: Annotated[
        Text,
        typer.Option(metavar="VERSION", help="Of the plan's library: 8.6, 10.13, rtx-1.7.", show_default="installed"),
    ] = None,
    tensorrt_decode_batches: Annotated[
        Text, typer.Option(metavar="LIST", help="TensorRT before 10.15: rows of a decoding step, such as 1,8,64.")
    ] = None,
    tensorrt_prefill_lengths: Annotated[
        Text, typer.Option(metavar="LIST", help="TensorRT before 10.15: tokens of a prompt's chunk.")
    ] = None,
    tensorrt_table_lengths: Annotated[
        Text, typer.Option(metavar="LIST", help="TensorRT before 10.15: tokens of cache that a step reads.")
    ] = None,
    tensorrt_cache_blocks: Annotated[
        Number, typer.Option(help="TensorRT before 10.15: blocks of the cache.", show_default="1.5 times the longest")
    ] = None,
    tensorrt_tokens_per_block: Annotated[
        Number, typer.Option(help="TensorRT before 10.15: tokens of a block of the cache.", show_default="32")
    ] = None,
    logits_candidates: Annotated[
        Number, typer.Option(help="TensorRT before 10.15: best tokens found on the GPU.", show_default="64")
    ] = None,
    refittable: Annotated[
        Flag, typer.Option("--refittable/--no-refittable", help="TensorRT: a plan that takes other weights.")
    ] = None,
    version_compatible: Annotated[
        Flag,
        typer.Option("--version-compatible/--no-version-compatible", help="TensorRT: a plan that later versions load."),
    ] = None,
    hardware_compatibility_level: Annotated[
        Text, typer.Option(help="TensorRT: none, ampere_plus, same_compute_capability.", show_default="none")
    ] = None,
    emit: Annotated[
        Text,
        typer.Option(
            help="engine, or network: what --from-network finishes on another machine.", show_default="engine"
        ),
    ] = None,
    from_network: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Build the engine of a network that --emit network wrote.")
    ] = None,
    build_config: Annotated[
        Path | None,
        typer.Option("--build-config", "--config", help="YAML or JSON file of options; the command line overrides it."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Threads that quantize and convert weights; 0: all cores.")] = 0,
    max_build_memory: Annotated[
        Text, typer.Option(metavar="SIZE", help="Keep the build within this, or refuse it: 3GB, 512MiB.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would be built and its cost, and stop.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write the engine.")] = False,
    dump: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the graph after every pass as text.")] = None,
    why: Annotated[Text, typer.Option(metavar="PASS", help="Say why a pass left places alone.")] = None,
    visualize_network: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the final graph without weights, for Netron.")
    ] = None,
    monitor_memory: Annotated[
        bool, typer.Option("--monitor-memory", help="Print the peak memory after each stage.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="debug (with tracebacks), info, warning, error.")] = "info",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=lambda value: _show_version(wanted=value)
        ),
    ] = False,
) -> Action:
    """Build an engine directory from a published model.

    trtllm-build ./Llama-3.2-1B --output-dir engine --quantization W4A16
    """
    request = BuildRequest(
        model=BuildRequest.one_model(model, checkpoint_dir, from_network),
        output_dir=output_dir,
        options={name: context.params[name] for name in BUILD_FIELDS if context.params[name] is not None},
        config_file=build_config,
        workers=workers,
        max_build_memory=max_build_memory,
        plan_only=plan,
        dry_run=dry_run,
        dump_dir=dump,
        why=why,
        visualize_dir=visualize_network,
        monitor_memory=monitor_memory,
        log_level="error" if quiet else log_level,
        emits=BuildRequest.emitted(emit),
        from_network=from_network,
    )
    return request.perform


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run(app, NAME, arguments, retired=RETIRED)


if __name__ == "__main__":
    sys.exit(main())
