"""Measures on text what matters in a decoder: how strong each linear's inputs are, and how much each layer changes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.calibration.segments import Segment, segment_feeds, segments, subgraph
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import weight_of
from trtllm.compiler.models.context import ModelBuilder
from trtllm.compiler.models.table import builder_for
from trtllm.compiler.pruning.expert_inputs import ExpertInputs, sum_of_squares
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
    """Of each input of a linear, float64 [K], by the name of the weight in the checkpoint.

    Of an expert's matrices over the tokens that are routed to it; ones where none is.
    """
    similarity: dict[int, float] = field(default_factory=dict)
    """Cosine between the states that enter and those that leave a layer."""
    routers: set[str] = field(default_factory=set)
    """Those of the weights that choose experts."""

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
    parts = segments(network)
    walk = _Walk(network, RecipeReader(checkpoint.tensors), tokens, threads, Measurements())
    progress.stage("measuring on text", len(parts))
    for part in parts:
        walk.run(part)
        progress.advance(1)
    return walk.found


@dataclass(eq=False)
class _Walk:
    """The states of all tokens on their way through the segments, and what was seen so far."""

    network: Network
    reader: RecipeReader
    tokens: np.ndarray
    threads: int
    found: Measurements
    states: list[np.ndarray] = field(default_factory=list)
    """What leaves the last segment, by batches of rows [rows, S, H]."""
    layer: int | None = None
    entering: list[np.ndarray] = field(default_factory=list)
    """What entered the layer that the last segment is of; a layer may be several segments."""

    def run(self, part: Segment) -> None:
        linears = {_source(node): node.inputs[0] for node in part.linears}
        mixtures = [node for node in part.nodes if is_dialect(node, "MoE")]
        read = dict.fromkeys(value for value in linears.values() if value is not None)
        routed = [value for node in mixtures for value in node.inputs[:2] if value is not None]
        start = part.entry or _residual(part)
        outputs = list(dict.fromkeys([part.exit, *read, *routed, *([start] if part.entry is None else [])]))
        graph, weights = subgraph(self.network, part, outputs)
        payloads = {name: self.reader.read(weight.recipe) for name, weight in weights.items()}
        experts = [ExpertInputs(self.network, node, payloads, weights) for node in mixtures]
        session, names = GraphSession(graph, threads=self.threads), [value.name or "" for value in outputs]
        before, after = [], []
        squares: dict[ir.Value, np.ndarray] = {}
        for number, rows in enumerate(self._batches()):
            feeds = segment_feeds(self.network, part, rows, self.states[number] if self.states else None)
            given = dict(zip(names, session.run({**feeds, **payloads}, names), strict=True))
            for value in read:
                squares[value] = squares.get(value, 0.0) + sum_of_squares(given[value.name or ""])
            for mixture in experts:
                mixture.add(given)
            before.append(self.states[number] if part.entry is not None else given[start.name or ""])
            after.append(given[part.exit.name or ""])
        total = self.tokens.size
        self.found.squares.update(
            {name: squares[value] / total for name, value in linears.items() if value is not None}
        )
        for mixture in experts:
            self.found.squares.update(mixture.means())
        choosing = {node.inputs[1] for node in mixtures}
        self.found.routers.update(_source(node) for node in part.linears if node.outputs[0] in choosing)
        self._turn(_layer_of(linears), before, after)

    def _batches(self) -> Iterator[np.ndarray]:
        step = max(1, _BATCH_TOKENS // self.tokens.shape[1])
        return (self.tokens[row : row + step] for row in range(0, len(self.tokens), step))

    def _turn(self, layer: int | None, before: list[np.ndarray], after: list[np.ndarray]) -> None:
        """The cosine from where the layer began to here; its last segment says that of the whole layer."""
        if layer != self.layer:
            self.layer, self.entering = layer, before
        self.states = after
        if layer is not None:
            cosines = sum(_cosines(x, y) for x, y in zip(self.entering, after, strict=True))
            self.found.similarity[layer] = cosines / self.tokens.size


def _cosines(before: np.ndarray, after: np.ndarray) -> float:
    """Sum over tokens of the cosine between states [rows, S, H]."""
    x, y = before.astype(np.float64), after.astype(np.float64)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return float(((x * y).sum(axis=-1) / np.maximum(norms, 1e-30)).sum())


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
