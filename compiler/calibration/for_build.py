"""What of a network a build's scheme wants calibrated, and where the calibration keeps its progress."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.calibration.calibrate import Calibration, CalibrationSettings, calibrate, weight_source
from trtllm.compiler.calibration.segments import segments
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.text import network_hash
from trtllm.config import BuildConfig
from trtllm.environment import cache_root
from trtllm.errors import UnsupportedModelError
from trtllm.passes.quantize import module_name
from trtllm.progress import Progress
from trtllm.quantization import SCHEMES, CalibratedWeightOnly


def wants_calibration(build: BuildConfig) -> bool:
    """Whether the build's scheme, or that of one of its layers, is chosen by calibration text."""
    names = {build.quantization, *build.quantized_layers.values()} - {None}
    return any(isinstance(SCHEMES[name], CalibratedWeightOnly) for name in names if name is not None)


def calibrate_build(
    network: Network, checkpoint: Checkpoint, build: BuildConfig, tokens: np.ndarray, progress: Progress,
    *, threads: int = 0,
) -> Calibration:  # fmt: skip
    """Calibrates the linears that the build wants so. Raises UnsupportedModelError when the graph cannot be cut."""
    scheme = SCHEMES[build.quantization or ""]
    settings = CalibrationSettings(
        bits=_calibrated_bits(network, build),
        block_size=build.group_size or scheme.block_size,
        flows_quantized=build.calib_inputs == "quantized",
    )
    if not settings.bits:
        raise UnsupportedModelError(
            f"{checkpoint.architecture} has no linear layer that {build.quantization} can calibrate",
            "choose W4A16 or W8A16, which need no calibration",
        )
    folder = Path(build.calib_dir).expanduser() if build.calib_dir else _folder(network, checkpoint, build)
    progress.note(f"calibration on {tokens.size} tokens, kept in {folder}")
    reader = RecipeReader(checkpoint.tensors, threads=threads)
    return calibrate(network, reader, tokens, settings, folder, progress, threads=threads)


def _calibrated_bits(network: Network, build: BuildConfig) -> dict[str, int]:
    bits: dict[str, int] = {}
    for segment in segments(network):
        for linear in segment.linears:
            source = weight_source(linear)
            if source is None or len(source.shape) != 2:
                continue
            module = module_name(source.name)
            scheme = SCHEMES[build.layer_plan.override(module) or build.quantization or ""]
            block = build.group_size or scheme.block_size
            wanted = isinstance(scheme, CalibratedWeightOnly) and not build.layer_plan.excludes(module)
            if wanted and isinstance(scheme, CalibratedWeightOnly) and source.shape[1] % block == 0:
                bits[source.name] = scheme.bits
    return bits


def _folder(network: Network, checkpoint: Checkpoint, build: BuildConfig) -> Path:
    """One folder for each model and scheme in the user's cache; another text or setting begins anew in it."""
    name = Path(checkpoint.source).name or "model"
    return cache_root() / "calibration" / f"{name}-{build.quantization}-{network_hash(network.model)[:12]}"
