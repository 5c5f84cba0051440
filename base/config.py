"""What a build is asked to do, checked once where it enters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trtllm.errors import UsageError
from trtllm.quantization import SCHEMES, LayerPlan, MixedPrecision, WeightScales

LogLevel = Literal["debug", "info", "warning", "error"]


class BuildConfig(BaseModel):
    """Shapes, types and target of a build. Field names and meanings are those of the reference `BuildConfig`.

    Lengths count tokens, batch sizes count sequences. `None` means "derived": `max_seq_len` from the model and
    memory, `dtype` from the target, `opt_*` from the maxima, `group_size`, `weight_scales`, `has_zero_point` from the
    scheme. The last is whether 4-bit blocks have a minimum beside their scale. `activation_bits` is what products by
    integers in blocks of 32 round their other side to.

    Without a `quantization` (or with "auto") a checkpoint that is stored quantized keeps its own, unless `dequantize`.

    `exclude_modules` are globs over module names that keep full precision, `quantized_layers` maps such globs to other
    schemes, `quantization_bits` is the average of a MIXED_PRECISION in bits per weight. Calibration reads `calib_size`
    samples of `calib_max_seq_length` tokens of `calib_dataset`, a JSONL or text file (None: the text that comes with
    the package), and keeps its progress in `calib_dir`. `kv_cache_quant_algo` is the format of stored keys and values;
    None: what the graph computes in.

    `tensorrt_version` names the library that a plan is for ("8.6", "10.13", "rtx-1.7"); None: the one installed. Plans
    without an in-place cache are built for fixed shapes: `tensorrt_decode_batches` rows of one token and
    `tensorrt_prefill_lengths` tokens of one row, each over `tensorrt_table_lengths` tokens of cache. All sequences
    share `tensorrt_cache_blocks` blocks of `tensorrt_tokens_per_block` tokens (None: half as many again as the
    max_batch_size longest take), `logits_candidates` are the best tokens of a row that the device finds, and
    `refittable` plans take other weights. `tensorrt_workspace_mb` is what plans may compute with beside weights, in
    2^20 bytes (None: all of the GPU's memory).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Literal["onnxruntime", "tensorrt"] = "onnxruntime"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    quantization: str | None = None
    dequantize: bool = False
    group_size: Literal[16, 32, 64, 128, 256] | None = None
    weight_scales: WeightScales | None = None
    has_zero_point: bool | None = None
    activation_bits: Literal[8, 16] = 8
    exclude_modules: tuple[str, ...] = ()
    quantized_layers: dict[str, str] = Field(default_factory=dict)
    quantization_bits: float | None = Field(None, gt=0, le=32)
    calib_dataset: str | None = None
    calib_size: int = Field(64, ge=1)
    calib_max_seq_length: int = Field(512, ge=2)
    calib_dir: str | None = None
    calib_inputs: Literal["quantized", "full"] = "quantized"
    kv_cache_quant_algo: Literal["INT8", "FP8"] | None = None
    optimization_level: Literal[0, 1, 2] = 2

    max_batch_size: int = Field(8, ge=1, le=65536)
    max_input_len: int | None = Field(None, ge=1)
    max_seq_len: int | None = Field(None, ge=1)
    max_num_tokens: int = Field(8192, ge=1)
    opt_batch_size: int | None = Field(None, ge=1)
    opt_num_tokens: int | None = Field(None, ge=1)

    gather_context_logits: bool = False
    pooling: Literal["auto", "mean", "cls", "last", "none"] = "auto"
    normalize_embeddings: bool | None = None
    logits_dtype: Literal["float32"] = "float32"
    strip_plan: bool = False
    weight_streaming: bool = False
    profiling_verbosity: Literal["layer_names_only", "detailed", "none"] = "layer_names_only"
    builder_optimization_level: int | None = Field(None, ge=0, le=5)
    compute_capabilities: tuple[str, ...] = ()
    tensorrt_version: str | None = None
    tensorrt_decode_batches: tuple[int, ...] = ()
    tensorrt_prefill_lengths: tuple[int, ...] = ()
    tensorrt_table_lengths: tuple[int, ...] = ()
    tensorrt_tokens_per_block: Literal[8, 16, 32, 64, 128] = 32
    tensorrt_cache_blocks: int | None = Field(None, ge=1)
    tensorrt_workspace_mb: int | None = Field(None, ge=1)
    logits_candidates: int = Field(64, ge=1, le=3840)
    refittable: bool = True
    version_compatible: bool = False
    hardware_compatibility_level: Literal["none", "ampere_plus", "same_compute_capability"] = "none"

    @model_validator(mode="after")
    def _consistent(self) -> BuildConfig:
        if self.quantization is not None and self.quantization not in SCHEMES:
            raise ValueError(
                f"quantization: unknown method '{self.quantization}'{_suggest(self.quantization, SCHEMES)}"
            )
        for method in self.quantized_layers.values():
            if method not in SCHEMES or isinstance(SCHEMES[method], MixedPrecision):
                raise ValueError(f"quantized_layers: unknown method '{method}'{_suggest(method, SCHEMES)}")
        if self.quantization is None and self._quantization_details():
            raise ValueError(f"{', '.join(self._quantization_details())} is given without a quantization")
        mixed = self.quantization is not None and isinstance(SCHEMES[self.quantization], MixedPrecision)
        if self.quantization_bits is not None and not mixed:
            raise ValueError("quantization_bits is a budget of the quantization MIXED_PRECISION")
        if mixed and self.quantization_bits is None and not self.quantized_layers:
            raise ValueError("MIXED_PRECISION needs quantization_bits or quantized_layers")
        if self.dequantize and self.quantization is not None:
            raise ValueError(f"dequantize asks for full precision, quantization for {self.quantization}")
        if self.max_input_len and self.max_seq_len and self.max_input_len > self.max_seq_len:
            raise ValueError(f"max_input_len {self.max_input_len} exceeds max_seq_len {self.max_seq_len}")
        if self.opt_batch_size and self.opt_batch_size > self.max_batch_size:
            raise ValueError(f"opt_batch_size {self.opt_batch_size} exceeds max_batch_size {self.max_batch_size}")
        return self

    def _quantization_details(self) -> list[str]:
        given = {
            "group_size": self.group_size,
            "weight_scales": self.weight_scales,
            "has_zero_point": self.has_zero_point,
            "exclude_modules": self.exclude_modules,
            "quantized_layers": self.quantized_layers,
            "quantization_bits": self.quantization_bits,
        }
        return [name for name, value in given.items() if value]

    @property
    def layer_plan(self) -> LayerPlan:
        return LayerPlan(self.exclude_modules, self.quantized_layers)


def build_config(values: Mapping[str, Any]) -> BuildConfig:
    """A checked BuildConfig. Raises UsageError that lists everything wrong, with the nearest known name."""
    known = BuildConfig.model_fields
    if values.get("quantization") == "auto":
        values = {**values, "quantization": None}
    unknown = [f"'{key}'{_suggest(key, known)}" for key in values if key not in known]
    if unknown:
        raise UsageError(f"unknown build option {', '.join(unknown)}", "see trtllm-build --help for the options")
    try:
        return BuildConfig(**values)
    except ValidationError as error:
        problems = "; ".join(_problem(item) for item in error.errors())
        raise UsageError(problems, "see trtllm-build --help for the values an option takes") from None


def build_config_from_file(path: Path) -> dict[str, Any]:
    """The options of a YAML or JSON build file, unchecked; keys may use hyphens. Raises UsageError."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path}: {error}", "--config takes a YAML or JSON file of build options"
        ) from None
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise UsageError(f"{path} is not YAML: {where}", "--config takes a YAML or JSON file of options") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no mapping of options", "write lines such as 'max_batch_size: 8'")
    return {str(key).replace("-", "_"): value for key, value in data.items()}


def _suggest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(known)})" if len(known) < 12 else ""


def _problem(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
