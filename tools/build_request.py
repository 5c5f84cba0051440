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
    "weight_scales", "exclude_modules", "quantized_layers", "quantization_bits", "group_size",
    "calib_dataset", "calib_size", "calib_max_seq_length", "calib_inputs", "calib_dir",
    "max_batch_size", "max_input_len", "max_seq_len",
    "max_num_tokens", "opt_batch_size", "opt_num_tokens", "gather_context_logits", "logits_dtype", "pooling",
    "normalize_embeddings", "strip_plan", "weight_streaming", "profiling_verbosity", "builder_optimization_level",
    "compute_capabilities",
)  # fmt: skip
"""Options of the command that are fields of BuildConfig."""
_REFERENCE_LEVELS = {"verbose": "debug", "internal_error": "error"}
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

    @staticmethod
    def one_model(positional: str | None, option: str | None) -> str:
        """The model, which is given once. Raises UsageError."""
        if positional is not None and option is not None and positional != option:
            raise UsageError(f"two models are given: {positional} and {option}", "build one at a time")
        model = positional or option
        if not model:
            raise UsageError("no model is given", "trtllm-build MODEL --output-dir DIR; --help lists the options")
        return model

    def perform(self, console: Console) -> int:
        """Builds, or plans; returns the exit code."""
        console.level = _level(self.log_level)
        from trtllm.tools.build_action import perform

        return perform(self, console)

    def build_config(self, console: Console) -> BuildConfig:
        """The file's options and the command line's, checked together."""
        from trtllm.config import build_config, build_config_from_file

        values = build_config_from_file(self.config_file) if self.config_file is not None else {}
        values = _without_retired(values, console) | dict(self.options)
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
