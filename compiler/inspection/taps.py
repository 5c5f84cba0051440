"""What goes into each normalization of a decoder: the places where an engine and its model are held side by side.

A norm's weight is never quantized nor packed and keeps its name through every pass, so that it names its place in the
graph of a model builder and in that of an engine alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.calibration.segments import Segment, segment_feeds, segments, subgraph
from trtllm.compiler.engine import ENGINE, Engine
from trtllm.compiler.ir.dialect import is_dialect
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import weight_of
from trtllm.compiler.targets.onnxruntime.graph_session import GraphSession
from trtllm.progress import Progress
from trtllm.runtime.sessions.onnxruntime_taps import TappedSession

LOGITS = "logits"
_SUM = 3
"""The output of onnxruntime's Skip*LayerNormalization that is the sum it normalizes."""


@dataclass(frozen=True, eq=False)
class Tap:
    """A place, by the name of the norm's weight or "logits", and its values for each row of tokens."""

    name: str
    rows: list[np.ndarray]
    """Float32 [T, H], or [T, V], or for logits of an engine that gives only those of last tokens [1, V]."""


class EngineTaps:
    """An engine whose norms' inputs can be read."""

    def __init__(self, engine: Engine, *, threads: int | None = None) -> None:
        import onnx

        model = onnx.load(str(engine.path / ENGINE), load_external_data=False)
        names = {entry.name for entry in engine.manifest.weights}
        self._places: dict[str, str] = {}
        for node in model.graph.node:
            weight = next((name for name in node.input if name in names), None)
            if "Norm" in node.op_type and weight is not None:
                self._places.setdefault(weight, _tapped(node))
        for name in dict.fromkeys(self._places.values()):
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        self._session = TappedSession(engine, model.SerializeToString(), threads=threads)

    @property
    def names(self) -> list[str]:
        """The places, in the order of the graph; logits are the last."""
        return [*self._places, LOGITS]

    def read(self, rows: Sequence[np.ndarray]) -> dict[str, Tap]:
        """Runs each row of tokens int64 [T] by itself."""
        values = list(dict.fromkeys(self._places.values()))
        taps = {name: Tap(name, []) for name in self.names}
        for tokens in rows:
            results = dict(zip([*values, LOGITS], self._session.run(tokens, [*values, LOGITS]), strict=True))
            for name, tap in taps.items():
                array = results[self._places.get(name, LOGITS)]
                tap.rows.append(array.reshape(-1, array.shape[-1]).astype(np.float32))
        return taps


def _tapped(node: object) -> str:
    """The name of what a norm normalizes; a sum that nobody reads gets one."""
    kind, inputs, outputs = node.op_type, node.input, node.output  # type: ignore[attr-defined]
    if not kind.startswith("Skip"):
        return str(inputs[0])
    while len(outputs) <= _SUM:
        outputs.append("")
    outputs[_SUM] = outputs[_SUM] or f"{node.name}_sum"  # type: ignore[attr-defined]
    return str(outputs[_SUM])


def reference_taps(
    network: Network, reader: RecipeReader, rows: Sequence[np.ndarray], progress: Progress, *, threads: int = 0
) -> Iterator[Tap]:
    """The same places of a network as a model builder made it, in float32 by the operators' reference bodies.

    The network's cache holds the tokens of the longest row, neither more nor less.
    Memory holds the weights of one segment of the graph, the states of all rows, and the places of one segment.
    """
    parts = segments(network)
    parts.append(_tail(network, parts[-1].exit if parts else None))
    progress.stage("running the model", len(parts))
    caches = _empty_caches(network, max(map(len, rows)))
    states: list[np.ndarray | None] = [None] * len(rows)
    for segment in parts:
        norms = {
            weight.name or "": node.inputs[0]
            for node in segment.nodes
            if is_dialect(node, "RMSNorm", "LayerNorm") and (weight := weight_of(node.inputs[1])) is not None
        }
        made = list(
            dict.fromkeys([segment.exit, *(v for v in norms.values() if v is not None and v is not segment.entry)])
        )
        graph, needed = subgraph(network, segment, made)
        session = GraphSession(graph, threads=threads)
        payloads = {name: reader.read(weight.recipe) for name, weight in needed.items()}
        taps = {name: Tap(name, []) for name in norms}
        last = Tap(LOGITS, [])
        for index, tokens in enumerate(rows):
            feeds = segment_feeds(network, segment, tokens[None], states[index]) | caches | payloads
            results = dict(zip(made, session.run(feeds, [value.name or "" for value in made]), strict=True))
            for name, value in norms.items():
                array = states[index] if value is segment.entry else results[value]  # type: ignore[index]
                assert array is not None
                taps[name].rows.append(array.reshape(-1, array.shape[-1]))
            states[index] = results[segment.exit]
            if segment is parts[-1]:
                last.rows.append(results[segment.exit][0])
        yield from taps.values()
        if last.rows:
            yield last
        progress.advance(1)


def _empty_caches(network: Network, capacity: int) -> dict[str, np.ndarray]:
    caches: dict[str, np.ndarray] = {}
    for index, layer in enumerate(network.info.cache):
        empty = np.zeros((1, layer.num_kv_heads, capacity, layer.head_size), np.float32)
        caches |= {f"past_key.{index}": empty, f"past_value.{index}": empty}
    return caches


def _tail(network: Network, entry: ir.Value | None) -> Segment:
    """What follows the last segment: norm and head."""
    logits = next(value for value in network.graph.outputs if value.name == LOGITS)
    wanted: set[ir.Node] = set()
    stack = [logits]
    while stack:
        value = stack.pop()
        producer = value.producer() if value is not entry else None
        if producer is not None and producer not in wanted:
            wanted.add(producer)
            stack += [item for item in producer.inputs if item is not None]
    return Segment(entry, logits, tuple(node for node in network.graph if node in wanted))
