"""Measures on text what matters in a decoder: how strong each linear's inputs are, and how much each layer changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.calibration.segments import Segment, segments, subgraph
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import weight_of
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.table import builder_for
from trtllm.compiler.targets.onnxruntime.graph_session import GraphSession
from trtllm.config import build_config
from trtllm.dtypes import DType
from trtllm.errors import UnsupportedModelError
from trtllm.progress import Progress

_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")
_BATCH_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Measurements:
    """Means over all tokens of the text."""

    squares: dict[str, np.ndarray] = field(default_factory=dict)
    """Of each input of a linear, float64 [K], by the name of the weight in the checkpoint."""
    similarity: dict[int, float] = field(default_factory=dict)
    """Cosine between what enters and what leaves a layer."""

    def influence(self, layer: int) -> float:
        """How much a layer turns the states of a token: 1 - cos(input, output)."""
        return 1.0 - self.similarity[layer]


def measure(checkpoint: Checkpoint, tokens: np.ndarray, progress: Progress, *, threads: int = 0) -> Measurements:
    """Runs int64 tokens [rows, S] through the model in float32, one segment of the graph at a time."""
    length = tokens.shape[1]
    network = builder_for(checkpoint)(
        ModelBuilder(checkpoint, build_config({"max_seq_len": length, "max_input_len": length}), DType.FLOAT32)
    )
    if network.info.kind != "decoder":
        raise UnsupportedModelError(f"{checkpoint.source} is an encoder", "only decoders are measured on text")
    reader, parts, found = RecipeReader(checkpoint.tensors), segments(network), Measurements()
    progress.stage("measuring on text", len(parts))
    states: list[np.ndarray] = []
    for part in parts:
        states = _run(network, part, reader, tokens, states, found, threads)
        progress.advance(1)
    return found


def _run(
    network: Network, part: Segment, reader: RecipeReader, tokens: np.ndarray, states: list[np.ndarray],
    found: Measurements, threads: int,
) -> list[np.ndarray]:  # fmt: skip
    linears = {_source(node): node.inputs[0] for node in part.linears}
    inputs = list(dict.fromkeys(value for value in linears.values() if value is not None))
    start = part.entry or _residual(part)
    outputs = [part.exit, *inputs, *([start] if part.entry is None else [])]
    graph, weights = subgraph(network, part, list(dict.fromkeys(outputs)))
    session, payloads = (
        GraphSession(graph, threads=threads),
        {name: reader.read(weight.recipe) for name, weight in weights.items()},
    )
    rows, length = tokens.shape
    step, layer = max(1, _BATCH_TOKENS // length), _layer_of(linears)
    squares: dict[ir.Value, np.ndarray] = {}
    after, turned = [], 0.0
    for number, row in enumerate(range(0, rows, step)):
        feeds = _feeds(network, tokens[row : row + step])
        if part.entry is not None:
            feeds[part.entry.name or ""] = states[number]
        names = [value.name or "" for value in dict.fromkeys(outputs)]
        given = dict(zip(names, session.run({**feeds, **payloads}, names), strict=True))
        for value in inputs:
            flat = given[value.name or ""].astype(np.float64)
            squares[value] = squares.get(value, 0.0) + np.square(flat.reshape(-1, flat.shape[-1])).sum(axis=0)
        before = states[number] if part.entry is not None else given[start.name or ""]
        after.append(given[part.exit.name or ""])
        turned += _cosines(before, after[-1])
    total = rows * length
    found.squares.update({name: squares[value] / total for name, value in linears.items() if value is not None})
    if layer is not None:
        _add_turn(found, layer, turned / total)
    return after


def _add_turn(found: Measurements, layer: int, cosine: float) -> None:
    """A layer of several segments turns the states by the angles of all: their sum, as in a plane, at most a turn."""
    angle = np.arccos(np.clip(found.similarity.get(layer, 1.0), -1, 1)) + np.arccos(np.clip(cosine, -1, 1))
    found.similarity[layer] = float(np.cos(min(angle, np.pi)))


def _cosines(before: np.ndarray, after: np.ndarray) -> float:
    """Sum over tokens of the cosine between states [rows, S, H]."""
    x, y = before.astype(np.float64), after.astype(np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return float(((x * y).sum(axis=-1) / np.maximum(norms, 1e-30)).sum())


def _feeds(network: Network, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens and an empty cache."""
    rows, length = tokens.shape
    feeds = {
        "input_ids": tokens,
        "past_lengths": np.zeros(rows, np.int64),
        "lengths": np.full(rows, length, np.int64),
    }
    for index, layer in enumerate(network.info.cache):
        empty = np.zeros((rows, layer.num_kv_heads, length, layer.head_size), np.float32)
        feeds |= {f"past_key.{index}": empty, f"past_value.{index}": empty}
    return feeds


def _source(linear: ir.Node) -> str:
    weight = weight_of(linear.inputs[1])
    assert weight is not None
    return weight.recipe.sources()[0]


def _residual(part: Segment) -> ir.Value:
    """The states that enter the first layer: what its first norm reads."""
    norm = next(node for node in part.nodes if is_dialect(node, "RMSNorm") or is_dialect(node, "LayerNorm"))
    value = norm.inputs[0]
    assert value is not None
    return value


def _layer_of(linears: Mapping[str, object]) -> int | None:
    match = next((found for found in map(_LAYER.search, linears) if found), None)
    return int(match[1]) if match else None
