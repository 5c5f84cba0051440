"""Calibration: states of all samples flow through one segment of the graph at a time, which is quantized on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Stored
from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.compiler.calibration.moments import InputMoments, added_linear
from trtllm.compiler.calibration.record import (
    COUNTED,
    MINIMA,
    RESCALED,
    SCALES,
    VALUES,
    CalibrationRecord,
    chained_key,
    stored_tensor,
)
from trtllm.compiler.calibration.segment_rounding import CalibrationSettings, SegmentRounder, weight_source
from trtllm.compiler.calibration.segments import Segment, segment_feeds, segments, subgraph
from trtllm.compiler.ir.network import Network
from trtllm.compiler.targets.onnxruntime.graph_session import GraphSession
from trtllm.passes.base import CalibratedWeight, ChannelRanges
from trtllm.progress import Progress

BATCH_TOKENS = 2048
"""Tokens that a segment runs at once."""
FULL, QUANTIZED = 0, 1
"""Which states of a file are those of the full layers, and of the quantized ones; the first alone where these flow."""
VERSION = "2"
"""Of the algorithm: results of another one are not taken up."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Quantized weights, and the tensors that hold them."""

    weights: Mapping[str, CalibratedWeight] = field(default_factory=dict)
    """By the checkpoint's tensor name."""
    tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    rescaled: Mapping[str, Stored] = field(default_factory=dict)
    """Norms that took up channel scales: initializers of the network by name, float32."""
    ranges: Mapping[str, ChannelRanges] = field(default_factory=dict)
    """What went through the linear layers, by the checkpoint's tensor name; for schemes that round activations."""
    tokens: np.ndarray | None = None
    """int64 [rows, length]: what was read; None when nothing was calibrated."""


def calibrate(
    network: Network,
    reader: RecipeReader,
    tokens: np.ndarray,
    settings: CalibrationSettings,
    folder: Path,
    progress: Progress,
    *,
    threads: int = 0,
) -> Calibration:
    """Quantizes the linears of `settings.bits`, segment by segment.

    Args:
        network: as a model builder made it, in float32, with a cache of `tokens.shape[1]` tokens.
        tokens: int64 [rows, S].
        folder: keeps finished segments; the same model, text and settings go on from there.

    Memory holds the weights of one segment, second moments of its inputs, and one batch of states; the states of all
    samples are mapped from files in `folder`.
    """
    record = CalibrationRecord(folder)
    record.sweep()
    run = _Run(network, reader, tokens, settings, record, threads)
    progress.stage("calibrating", len(run.parts))
    first = chained_key(VERSION, tokens.tobytes(), _settings_bytes(settings))
    done = run.finished(first)
    weights: dict[str, CalibratedWeight] = {}
    tensors: dict[str, LazyTensor] = {}
    key = first
    for index in range(len(run.parts)):
        key = run.segment(index, key, weights, tensors, is_done=index < done)
        progress.advance(1)
    return Calibration(weights, tensors, run.rescaled)


def _payload_bytes(payloads: Mapping[str, np.ndarray]) -> list[memoryview]:
    return [np.ascontiguousarray(array).reshape(-1).view(np.uint8).data for _, array in sorted(payloads.items())]


def _settings_bytes(settings: CalibrationSettings) -> bytes:
    values = [sorted(settings.bits.items()), settings.block_size, settings.method, settings.flows_quantized]
    values.append(settings.counted)
    return json.dumps(values).encode()


class _Batch(NamedTuple):
    """Rows and what they feed."""

    start: int
    stop: int
    feeds: dict[str, np.ndarray]
    full_feeds: dict[str, np.ndarray]


class _Run:
    """One calibration under way."""

    def __init__(
        self, network: Network, reader: RecipeReader, tokens: np.ndarray, settings: CalibrationSettings,
        record: CalibrationRecord, threads: int,
    ) -> None:  # fmt: skip
        self.parts = segments(network)
        self.rescaled: dict[str, Stored] = {}
        self._network = network
        self._reader = reader
        self._tokens = tokens
        self._settings = settings
        self._record = record
        self._threads = threads
        self._full: np.memmap | None = None
        """The states behind the segment under way, those of its full layers written."""

    def finished(self, first: str) -> int:
        """How many segments need not be run: their files fit the key, and the states behind the last are there."""
        key = first
        for index in range(len(self.parts)):
            own = chained_key(key, *_payload_bytes(self._payloads(index)))
            if self._record.result(index, own) is None:
                return index if index == 0 or self._record.states(key) is not None else 0
            key = own
        return len(self.parts)

    def segment(
        self, index: int, key: str, weights: dict[str, CalibratedWeight], tensors: dict[str, LazyTensor],
        *, is_done: bool,
    ) -> str:  # fmt: skip
        """Takes up or makes one segment's results; returns its key."""
        inputs = self._grouped(self.parts[index])
        payloads = self._payloads(index)
        own = chained_key(key, *_payload_bytes(payloads))
        file = self._record.result(index, own) if is_done else None
        if file is None:
            results = self._quantized(index, inputs, payloads, key, own)
            file = self._record.write_result(index, own, results)
            self._record.drop_states(key)
        for linears in inputs.values():
            for linear in linears:
                source = weight_source(linear)
                assert source is not None
                weights[source.name] = self._stored(file, source.name, tensors)
        for name in file.specs:
            if name.endswith(RESCALED):
                tensors[name] = file.tensor(name)
                self.rescaled[name.removesuffix(RESCALED)] = _stored_as(name, tensors[name])
        return own

    def _stored(self, file: SafetensorsFile, source: str, tensors: dict[str, LazyTensor]) -> CalibratedWeight:
        """The recipes of a finished weight; the tensors that they name join `tensors`."""

        def taken(suffix: str) -> Stored:
            name = source + suffix
            packs = suffix in (VALUES, COUNTED) and self._settings.bits[source] == 4
            tensors[name] = tensor = stored_tensor(file, name, packs_int4=packs)
            return _stored_as(name, tensor)

        if source + COUNTED in file.specs:
            return CalibratedWeight(taken(COUNTED), taken(SCALES), taken(MINIMA))
        return CalibratedWeight(taken(VALUES), taken(SCALES))

    def _payloads(self, index: int) -> dict[str, np.ndarray]:
        _, needed = subgraph(self._network, self.parts[index], [self.parts[index].exit])
        return {name: self._reader.read(weight.recipe) for name, weight in needed.items()}

    def _quantized(
        self, index: int, inputs: dict[ir.Value, list[ir.Node]], payloads: dict[str, np.ndarray], key: str, own: str
    ) -> dict[str, np.ndarray]:
        segment = self.parts[index]
        network, _ = subgraph(self._network, segment, [segment.exit, *inputs])
        session = GraphSession(network, threads=self._threads)
        states = self._record.states(key) if segment.entry is not None else None
        moments = self._moments(session, segment, inputs, payloads, states, own)
        rounder = SegmentRounder(self._settings, payloads, moments, self._threads)
        results, rounded = rounder.round(inputs)
        if self._settings.flows_quantized and segment is not self.parts[-1]:
            self._flow(session, segment, rounded, states, own)
        return results

    def _moments(
        self, session: GraphSession, segment: Segment, inputs: dict[ir.Value, list[ir.Node]],
        payloads: dict[str, np.ndarray], states: np.ndarray | None, own: str,
    ) -> dict[str, InputMoments]:  # fmt: skip
        """The sums of each input value; writes the states that full layers leave behind the segment."""
        names = [value.name or "" for value in inputs]
        goes_on = segment is not self.parts[-1]
        last = added_linear(segment.entry, segment.exit, segment.linears)
        deviates = self._settings.flows_quantized and states is not None
        found = {name: InputMoments(np.zeros(())) for name in names}
        written = None
        for start, stop, feeds, full_feeds in self._batches(segment, states):
            full = session.run({**full_feeds, **payloads}, [*names, *([segment.exit.name or ""] if goes_on else [])])
            if goes_on:
                written = self._written(written, FULL, full.pop(), start, stop)
            mine = session.run({**feeds, **payloads}, names) if deviates else full
            for (value, linears), x, y in zip(inputs.items(), mine, full, strict=True):
                moments, flat = found[value.name or ""], _flat(x)
                moments.own = moments.own + (flat.T @ flat).astype(np.float64)
                moments.tokens += len(flat)
                if not deviates:
                    continue
                product = ((_flat(y) - flat).T @ flat).astype(np.float64)
                moments.full = product if moments.full is None else moments.full + product
                if last in linears and segment.entry is not None:
                    name = segment.entry.name or ""
                    product = ((_flat(full_feeds[name]) - _flat(feeds[name])).T @ flat).astype(np.float64)
                    moments.residual = {last: moments.residual.get(last, 0) + product}
        if written is not None and not self._settings.flows_quantized:
            self._record.keep_states(written, own)
        self._full = written
        return found

    def _flow(
        self, session: GraphSession, segment: Segment, payloads: dict[str, np.ndarray], states: np.ndarray | None,
        own: str,
    ) -> None:  # fmt: skip
        written = self._full
        for start, stop, feeds, _ in self._batches(segment, states):
            (x,) = session.run({**feeds, **payloads}, [segment.exit.name or ""])
            written = self._written(written, QUANTIZED, x, start, stop)
        assert written is not None
        self._record.keep_states(written, own)

    def _written(self, states: np.memmap | None, kind: int, x: np.ndarray, start: int, stop: int) -> np.memmap:
        if states is None:
            kinds = 2 if self._settings.flows_quantized else 1
            states = self._record.new_states((kinds, len(self._tokens), *x.shape[1:]))
        states[kind, start:stop] = x
        return states

    def _batches(self, segment: Segment, states: np.ndarray | None) -> Iterator[_Batch]:
        """Row ranges and what they feed to the graph beside weights, from the quantized and from the full layers."""
        rows, length = self._tokens.shape
        step = max(1, BATCH_TOKENS // length)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            feeds = [
                segment_feeds(self._network, segment, self._tokens[start:stop], _rows(part, start, stop))
                for part in ([None] if states is None else states)
            ]
            yield _Batch(start, stop, feeds[-1], feeds[FULL])

    def _grouped(self, segment: Segment) -> dict[ir.Value, list[ir.Node]]:
        """The linears to quantize, by the value that they read."""
        groups: dict[ir.Value, list[ir.Node]] = {}
        for linear in segment.linears:
            source, value = weight_source(linear), linear.inputs[0]
            if source is not None and value is not None and source.name in self._settings.bits:
                groups.setdefault(value, []).append(linear)
        return groups


def _flat(x: np.ndarray) -> np.ndarray:
    """[tokens, K] of [B, S, K]."""
    return x.reshape(-1, x.shape[-1])


def _rows(states: np.ndarray | None, start: int, stop: int) -> np.ndarray | None:
    return None if states is None else np.ascontiguousarray(states[start:stop])


def _stored_as(name: str, tensor: LazyTensor) -> Stored:
    digest = hashlib.sha256(tensor.read().tobytes()).hexdigest()
    return Stored(name, tensor.spec.shape, tensor.spec.dtype, digest)
