"""Largest magnitudes that calibration text puts through each channel of the linear layers, segment by segment."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.calibration.segments import Segment, segment_feeds, segments, subgraph
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import weight_of
from trtllm.compiler.targets.onnxruntime.graph_session import GraphSession
from trtllm.config import BuildConfig
from trtllm.passes.base import ChannelRanges
from trtllm.progress import Progress
from trtllm.quantization import SCHEMES, ScaledFormat

BATCH_TOKENS = 2048
"""Tokens that a segment runs at once."""


def wants_ranges(build: BuildConfig) -> bool:
    """Whether the build's scheme, or that of one of its layers, rounds activations by what calibration text shows."""
    schemes = [SCHEMES[name] for name in (build.quantization, *build.quantized_layers.values()) if name is not None]
    return any(isinstance(scheme, ScaledFormat) and scheme.needs_ranges for scheme in schemes)


def activation_ranges(
    network: Network, reader: RecipeReader, tokens: np.ndarray, progress: Progress, *, threads: int = 0
) -> dict[str, ChannelRanges]:
    """The ranges of every linear layer, by the name of each checkpoint tensor that its weight is made of.

    Args:
        network: as a model builder made it, in float32, with a cache of `tokens.shape[1]` tokens.
        tokens: int64 [rows, S].

    Memory holds the weights of one segment and the states of all samples.
    """
    found: dict[str, ChannelRanges] = {}
    parts = segments(network)
    progress.stage("measuring activations", len(parts))
    states: np.ndarray | None = None
    for segment in parts:
        states = _measure(network, reader, segment, tokens, states, found, threads)
        progress.advance(1)
    return found


def _measure(
    network: Network, reader: RecipeReader, segment: Segment, tokens: np.ndarray, states: np.ndarray | None,
    found: dict[str, ChannelRanges], threads: int,
) -> np.ndarray:  # fmt: skip
    """Adds what one segment shows to `found`; returns the states behind it [rows, S, H]."""
    inputs: dict[ir.Value, list[ir.Node]] = {}
    for linear in segment.linears:
        value = linear.inputs[0]
        assert value is not None
        inputs.setdefault(value, []).append(linear)
    part, needed = subgraph(network, segment, [segment.exit, *(value for value in inputs if value is not segment.exit)])
    payloads = {name: reader.read(weight.recipe) for name, weight in needed.items()}
    session = GraphSession(part, threads=threads)
    names = [value.name or "" for value in inputs]
    largest: list[np.ndarray] = [np.zeros(0, np.float32)] * len(names)
    behind = []
    step = max(1, BATCH_TOKENS // tokens.shape[1])
    for start in range(0, len(tokens), step):
        before = None if states is None else states[start : start + step]
        feeds = segment_feeds(network, segment, tokens[start : start + step], before)
        *outputs, after = session.run({**feeds, **payloads}, [*names, segment.exit.name or ""])
        behind.append(after)
        for index, x in enumerate(outputs):
            most = np.abs(x.reshape(-1, x.shape[-1])).max(axis=0)
            largest[index] = np.maximum(largest[index], most) if len(largest[index]) else most
    for most, linears in zip(largest, inputs.values(), strict=True):
        for linear in linears:
            weight = weight_of(linear.inputs[1])
            assert weight is not None
            columns = np.abs(payloads[linear.inputs[1].name or ""]).max(axis=0)  # type: ignore[union-attr]
            for name in weight.recipe.sources():
                found[name] = ChannelRanges(most, columns)
    return np.concatenate(behind)
