"""Measures each linear layer's sensitivity: one segment at a time, one layer rounded at a time, on a few samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.calibration.segment_rounding import weight_source
from trtllm.compiler.calibration.segments import Segment, segment_feeds, segments, subgraph
from trtllm.compiler.calibration.sensitivity import Sensitivity, rounded
from trtllm.compiler.ir.network import Network
from trtllm.compiler.targets.onnxruntime.graph_session import GraphSession
from trtllm.progress import Progress


def measure(
    network: Network,
    reader: RecipeReader,
    tokens: np.ndarray,
    names: Sequence[str],
    widths: Sequence[int],
    block_size: int,
    progress: Progress,
    *,
    counted: bool = False,
    threads: int = 0,
) -> dict[str, Sensitivity]:
    """The sensitivity of each weight of `names` (the checkpoint's tensor names) at each of `widths` bits.

    Full-precision states of `tokens` int64 [B, S] flow through the segments; memory holds them, one segment's weights
    and one more copy of one weight.
    """
    parts = segments(network)
    wanted = set(names)
    found: dict[str, Sensitivity] = {}
    states: np.ndarray | None = None
    progress.stage("measuring layers", len(parts))
    for segment in parts:
        graph, needed = subgraph(network, segment, [segment.exit])
        session, exit_name = GraphSession(graph, threads=threads), segment.exit.name or ""
        payloads = {name: reader.read(weight.recipe) for name, weight in needed.items()}
        feeds = segment_feeds(network, segment, tokens, states) | payloads
        (full,) = session.run(feeds, [exit_name])
        energy = float(np.square(full, dtype=np.float64).sum())
        for name, source in _weights(segment):
            if source not in wanted:
                continue
            damage = {}
            for bits in widths:
                made = rounded(payloads[name], bits, block_size, counted=counted, threads=threads)
                (changed,) = session.run(feeds | {name: made}, [exit_name])
                damage[bits] = float(np.square(changed - full, dtype=np.float64).sum()) / max(energy, 1e-30)
            found[source] = Sensitivity(payloads[name].size, damage)
        states = full
        progress.advance(1)
    return found


def _weights(segment: Segment) -> list[tuple[str, str]]:
    """The graph's name of each linear weight, and the checkpoint's."""
    found = []
    for linear in segment.linears:
        source, value = weight_source(linear), linear.inputs[1]
        if source is not None and value is not None:
            found.append((value.name or "", source.name))
    return found
