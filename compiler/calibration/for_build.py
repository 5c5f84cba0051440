"""What of a network a build's scheme wants calibrated, and where the calibration keeps its progress."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.calibration.calibrate import Calibration, calibrate
from trtllm.compiler.calibration.measure import measure
from trtllm.compiler.calibration.segment_rounding import CalibrationSettings, weight_source
from trtllm.compiler.calibration.segments import segments
from trtllm.compiler.calibration.sensitivity import bits_with_scales, spend
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.text import network_hash
from trtllm.compiler.targets.table import target_of
from trtllm.config import BuildConfig
from trtllm.dtypes import DType
from trtllm.environment import cache_root
from trtllm.errors import UnsupportedModelError, UsageError
from trtllm.passes.quantize import module_name, refuse_zero_point, takes_minima
from trtllm.progress import Progress
from trtllm.quantization import SCHEMES, CalibratedMethod, CalibratedWeightOnly, MixedPrecision

MEASURED_TOKENS = 2048
"""Tokens on which layers' sensitivity is measured."""


def wants_calibration(build: BuildConfig) -> bool:
    """Whether the build's scheme, or that of one of its layers, is chosen by calibration text."""
    if build.quantization_bits is not None:
        return True
    names = {build.quantization, *build.quantized_layers.values()} - {None}
    return any(isinstance(SCHEMES[name], CalibratedWeightOnly) for name in names if name is not None)


def calibrate_build(
    network: Network, checkpoint: Checkpoint, build: BuildConfig, tokens: np.ndarray, progress: Progress,
    *, threads: int = 0,
) -> Calibration:  # fmt: skip
    """Calibrates the linears that the build wants so. Raises UnsupportedModelError when the graph cannot be cut."""
    scheme = SCHEMES[build.quantization or ""]
    reader = RecipeReader(checkpoint.tensors, threads=threads)
    counted = _counts(network, build)
    settings = CalibrationSettings(
        bits=_bits(network, reader, build, tokens, progress, threads, counted=counted),
        block_size=build.group_size or scheme.block_size,
        method=_method(build),
        flows_quantized=build.calib_inputs == "quantized",
        counted=counted,
    )
    if not settings.bits:
        raise UnsupportedModelError(
            f"{checkpoint.architecture} has no linear layer that {build.quantization} can calibrate",
            "choose W4A16 or W8A16, which need no calibration",
        )
    folder = Path(build.calib_dir).expanduser() if build.calib_dir else _folder(network, checkpoint, build)
    progress.note(f"calibration on {tokens.size} tokens, kept in {folder}")
    return calibrate(network, reader, tokens, settings, folder, progress, threads=threads)


def _bits(
    network: Network, reader: RecipeReader, build: BuildConfig, tokens: np.ndarray, progress: Progress, threads: int,
    *, counted: bool,
) -> dict[str, int]:  # fmt: skip
    """Bits of each weight that is calibrated; a budget of bits is spent where layers are most sensitive."""
    fixed = _calibrated_bits(network, build)
    if build.quantization_bits is None:
        return fixed
    scheme = SCHEMES[build.quantization or ""]
    assert isinstance(scheme, MixedPrecision)
    block_size = build.group_size or scheme.block_size
    names = [name for name in _linear_weights(network, build) if build.layer_plan.override(module_name(name)) is None]
    rows = max(1, MEASURED_TOKENS // tokens.shape[1])
    layers = measure(
        network, reader, tokens[:rows], names, scheme.choices, block_size, progress, counted=counted, threads=threads
    )
    chosen = spend(layers, build.quantization_bits, block_size, counted=counted)
    sizes = {bits: bits_with_scales(bits, block_size, counted=counted) for bits in scheme.choices}
    spent = sum(layers[name].elements * sizes[bits] for name, bits in chosen.items())
    average = spent / max(1, sum(layer.elements for layer in layers.values()))
    counts = ", ".join(f"{list(chosen.values()).count(bits)} of {bits} bits" for bits in scheme.choices)
    progress.note(f"{average:.2f} bits per weight of {len(chosen)} linear layers: {counts}")
    if average > build.quantization_bits:
        least = sizes[min(scheme.choices)]
        raise UsageError(
            f"quantization_bits {build.quantization_bits} is less than the {least} bits that the smallest layers take",
            f"give {least} or more: scales{' and minima' if counted else ''} count",
        )
    return fixed | chosen


def _counts(network: Network, build: BuildConfig) -> bool:
    """Whether blocks of 4 bits have minima in this build."""
    capabilities = target_of(build).capabilities
    refuse_zero_point(network, build, capabilities)
    wanted = capabilities.compute_dtypes[0] if build.dtype == "auto" else DType.of(build.dtype)
    compute = capabilities.dtype_fallbacks.get(wanted, wanted)
    return takes_minima(build, SCHEMES[build.quantization or ""], network, compute, capabilities)


def _method(build: BuildConfig) -> CalibratedMethod:
    """The one method of the build's calibrated schemes. Raises UsageError when they have two."""
    names = [name for name in (build.quantization, *build.quantized_layers.values()) if name is not None]
    methods = {scheme.method for name in names if isinstance(scheme := SCHEMES[name], CalibratedWeightOnly)}
    if len(methods) > 1:
        raise UsageError("AWQ and GPTQ cannot be mixed in one build", "give all calibrated layers one of them")
    return next(iter(methods), "gptq")


def _linear_weights(network: Network, build: BuildConfig) -> list[str]:
    """Names of the linear weights that may be quantized at all."""
    scheme = SCHEMES[build.quantization or ""]
    block = build.group_size or scheme.block_size
    sources = [weight_source(linear) for segment in segments(network) for linear in segment.linears]
    return [
        source.name
        for source in sources
        if source is not None
        and len(source.shape) == 2
        and source.shape[1] % block == 0
        and not build.layer_plan.excludes(module_name(source.name))
    ]


def _calibrated_bits(network: Network, build: BuildConfig) -> dict[str, int]:
    bits = {}
    for name in _linear_weights(network, build):
        scheme = SCHEMES[build.layer_plan.override(module_name(name)) or build.quantization or ""]
        if isinstance(scheme, CalibratedWeightOnly):
            bits[name] = scheme.bits
    return bits


def _folder(network: Network, checkpoint: Checkpoint, build: BuildConfig) -> Path:
    """One folder for each model and scheme in the user's cache; another text or setting begins anew in it."""
    name = Path(checkpoint.source).name or "model"
    return cache_root() / "calibration" / f"{name}-{build.quantization}-{network_hash(network.model)[:12]}"
