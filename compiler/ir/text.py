"""Graphs as text in the ONNX textual syntax, and their hash: weights appear by name, type and shape only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from trtllm.compiler.ir.weights import Weight

WEIGHTS_FILE = "weights"


def to_proto_without_weights(model: ir.Model, place: Callable[[Weight], ir.ExternalTensor] | None = None) -> bytes:
    """The serialized model whose weights are external references; `place` says where each one lies."""
    place = place or _nowhere
    values = [value for value in model.graph.initializers.values() if isinstance(value.const_value, Weight)]
    weights = [value.const_value for value in values]
    try:
        for value, weight in zip(values, weights, strict=True):
            assert isinstance(weight, Weight)
            value.const_value = place(weight)
        data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        return data
    finally:
        for value, weight in zip(values, weights, strict=True):
            value.const_value = weight


def network_hash(model: ir.Model) -> str:
    """sha256 of the graph with its weights' names, types and shapes but not their values."""
    return hashlib.sha256(to_proto_without_weights(model)).hexdigest()


def to_text(model: ir.Model) -> str:
    """The graph in ONNX textual syntax. `from_text` reads it back; weights come back without values."""
    import onnx

    return onnx.printer.to_text(onnx.ModelProto.FromString(to_proto_without_weights(model)))


def from_text(text: str) -> ir.Model:
    """A graph from ONNX textual syntax. Raises onnx.parser.ParseError."""
    import onnx

    return ir.from_proto(onnx.parser.parse_model(text))


def from_bytes(data: bytes) -> ir.Model:
    """A graph that `to_proto_without_weights` wrote; weights come back as external references without values."""
    import onnx

    return ir.from_proto(onnx.ModelProto.FromString(data))


def dump(model: ir.Model, folder: Path, index: int, stage: str) -> Path:
    """Writes `03-fuse-add-norm.onnxtxt` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{index:02d}-{stage}.onnxtxt"
    path.write_text(to_text(model), encoding="utf-8")
    return path


def write_graph(model: ir.Model, folder: Path) -> Path:
    """Writes the graph without weights as `network.onnx` into `folder`, for a viewer."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "network.onnx"
    path.write_bytes(to_proto_without_weights(model))
    return path


def _nowhere(weight: Weight) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        WEIGHTS_FILE, 0, weight.recipe.nbytes, weight.dtype, shape=weight.shape, name=weight.name or "", base_dir=""
    )
