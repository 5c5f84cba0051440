"""What a `trtllm-build` command line asks for, as a value; carrying it out loads the compiler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtllm.errors import UsageError, nearest
from trtllm.tools.console import LEVELS, Console
from trtllm.tools.retired_flags import RETIRED

if TYPE_CHECKING:
    from trtllm.config import BuildConfig

BUILD_FIELDS = (
    "target", "dtype", "quantization", "dequantize", "kv_cache_quant_algo", "optimization_level",
    "weight_scales", "has_zero_point", "activation_bits", "exclude_modules", "quantized_layers", "quantization_bits",
    "group_size",
    "calib_dataset", "calib_size", "calib_max_seq_length", "calib_inputs", "calib_dir",
    "max_batch_size", "max_input_len", "max_seq_len",
    "max_num_tokens", "opt_batch_size", "opt_num_tokens", "gather_context_logits", "logits_dtype", "pooling",
    "normalize_embeddings", "strip_plan", "weight_streaming", "profiling_verbosity", "builder_optimization_level",
    "compute_capabilities", "tensorrt_version", "tensorrt_decode_batches", "tensorrt_prefill_lengths",
    "tensorrt_table_lengths", "tensorrt_cache_blocks", "tensorrt_tokens_per_block", "logits_candidates", "refittable",
    "tensorrt_workspace_mb",
    "version_compatible", "hardware_compatibility_level",
)  # fmt: skip
"""Options of the command that are fields of BuildConfig."""
_REFERENCE_LEVELS = {"verbose": "debug", "internal_error": "error"}
_NUMBER_LISTS = ("tensorrt_decode_batches", "tensorrt_prefill_lengths", "tensorrt_table_lengths")
_NO_QUANTIZATION = ("none", "full_prec", "no_quant")


@dataclass(frozen=True)
class BuildRequest:
    """One run of the command."""

    model: str
    output_dir: Path
    options: Mapping[str, Any]
    """Fields of BuildConfig that were given."""
    config_file: Path | None
    workers: int
    max_build_memory: str | None
    plan_only: bool
    dry_run: bool
    dump_dir: Path | None
    why: str | None
    visualize_dir: Path | None
    monitor_memory: bool
    log_level: str
    emits: str = "engine"
    """What is written: "engine", or "network" for another machine to finish."""
    from_network: Path | None = None
    """The network to finish; then there is no model."""

    @staticmethod
    def emitted(name: str | None) -> str:
        """A value of --emit. Raises UsageError."""
        known = ("engine", "network")
        if name is not None and name not in known:
            raise UsageError(f"unknown --emit {nearest(name, known)}", f"known: {', '.join(known)}")
        return name or "engine"

    @staticmethod
    def one_model(positional: str | None, option: str | None, network: Path | None = None) -> str:
        """The model, which is given once, or empty when a network takes its place. Raises UsageError."""
        if network is not None and (positional or option):
            raise UsageError(
                f"a model and --from-network are given: {positional or option}", "a network is one already"
            )
        if network is not None:
            return ""
        if positional is not None and option is not None and positional != option:
            raise UsageError(f"two models are given: {positional} and {option}", "build one at a time")
        model = positional or option
        if not model:
            raise UsageError("no model is given", "trtllm-build MODEL --output-dir DIR; --help lists the options")
        return model

    def perform(self, console: Console) -> int:
        """Builds, or plans; returns the exit code."""
        console.level = _level(self.log_level)
        if self.from_network is not None:
            from trtllm.tools.finish_action import perform as finish

            return finish(self, console)
        from trtllm.tools.build_action import perform

        return perform(self, console)

    def given_options(self, console: Console) -> dict[str, Any]:
        """The file's options and the command line's, as fields of BuildConfig, unchecked."""
        from trtllm.config import build_config_from_file

        values = build_config_from_file(self.config_file) if self.config_file is not None else {}
        values = _without_retired(values, console) | dict(self.options)
        for name in _NUMBER_LISTS:
            if isinstance(values.get(name), str):
                values[name] = _numbers(name, values[name])
        return values

    def build_config(self, console: Console) -> BuildConfig:
        """The file's options and the command line's, checked together."""
        from trtllm.config import build_config

        values = self.given_options(console)
        capabilities = values.get("compute_capabilities")
        if isinstance(capabilities, str):
            values["compute_capabilities"] = tuple(filter(None, capabilities.replace(" ", "").split(",")))
        if isinstance(values.get("exclude_modules"), str):
            values["exclude_modules"] = tuple(filter(None, values["exclude_modules"].replace(" ", "").split(",")))
        if isinstance(values.get("quantized_layers"), str):
            values["quantized_layers"] = _schemes_by_layer(values["quantized_layers"])
        named = values.get("quantization")
        if isinstance(named, str) and named.lower() in _NO_QUANTIZATION:
            values |= {"quantization": None, "dequantize": True}
        cache = values.pop("kv_cache_dtype", None)
        values["kv_cache_quant_algo"] = _cache_algorithm(values.get("kv_cache_quant_algo") or cache)
        return build_config(values)


def _cache_algorithm(name: Any) -> str | None:
    """A kv_cache_quant_algo in any case, or the reference's kv_cache_dtype. Raises UsageError."""
    known = {"auto": None, "int8": "INT8", "fp8": "FP8"}
    if name is not None and str(name).lower() not in known:
        raise UsageError(f"unknown kv_cache_dtype {nearest(str(name), known)}", f"known: {', '.join(known)}")
    return known["auto" if name is None else str(name).lower()]


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """`1,8,64`. Raises UsageError."""
    parts = [part for part in text.replace(" ", "").split(",") if part]
    if not parts or not all(part.isdigit() and int(part) for part in parts):
        flag = name.replace("_", "-")
        raise UsageError(f"--{flag} '{text}' is no list of numbers", f"write it like --{flag} 1,8,64")
    return tuple(int(part) for part in parts)


def _schemes_by_layer(text: str) -> dict[str, str]:
    """`*.v_proj=W8A16,lm_head=W4A16` as a mapping. Raises UsageError."""
    pairs = [item.split("=") for item in text.replace(" ", "").split(",") if item]
    if any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"'{text}' is no list of layers and schemes", "write PATTERN=SCHEME, separated by commas")
    return {pair[0]: pair[1] for pair in pairs}


def _level(name: str) -> str:
    name = _REFERENCE_LEVELS.get(name.lower(), name.lower())
    if name not in LEVELS:
        raise UsageError(f"unknown log level {nearest(name, LEVELS)}", f"known: {', '.join(LEVELS)}")
    return name


def _without_retired(values: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """A file's options without those of the reference that mean nothing here; each is noted or refused."""
    kept = {}
    for key, value in values.items():
        flag = RETIRED.get("--" + key.replace("_", "-"))
        if flag is None:
            kept[key] = value
        elif value is not None:
            console.tell(f"warning: {flag.note(key, str(value))}", "warning")
    return kept
