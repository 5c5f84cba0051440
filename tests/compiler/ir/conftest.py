"""Runs one dialect operator by its reference body in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from trtllm.compiler.ir.builder import OPSET, GraphBuilder
from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.compiler.ir.dialect import DOMAIN
from trtllm.compiler.ir.network import ModelInfo, Network
from trtllm.compiler.ir.verifier import verify
from trtllm.config import BuildConfig
from trtllm.dtypes import DType
from trtllm.passes.base import PassContext
from trtllm.passes.inline_dialect import InlineDialect

DYNAMIC = 2
"""Leading axes of an operand that a model leaves open: batch and sequence."""


@pytest.fixture
def run_operator() -> Callable[..., list[np.ndarray]]:
    """`run(op_type, operands, **attributes)` gives the operator's results.

    Extents of the operands in `static` are known to the graph, of the others only those after the first two.
    """
    return run


def run(op_type: str, operands: Sequence[np.ndarray], static: Sequence[int] = (), **attributes: Any) -> list[Any]:
    import onnxruntime

    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name=op_type)
    b = GraphBuilder(graph)
    names = [f"operand{index}" for index in range(len(operands))]
    inputs = [
        b.input(name, DType.of(operand.dtype.name), _extents(operand, index in static))
        for index, (name, operand) in enumerate(zip(names, operands, strict=True))
    ]
    results = b.dialect(op_type, inputs, name="node", **attributes)
    results = results if isinstance(results, tuple) else (results,)
    declared = [(result.dtype, result.shape) for result in results]
    for index, result in enumerate(results):
        b.output(result, f"result{index}")
    network = Network(ir.Model(graph, ir_version=11), ModelInfo("decoder", "Small", 8, 8, 1, 16))
    verify(graph, after="the test")
    context = PassContext(BuildConfig(), Capabilities("reference", frozenset(), (DType.FLOAT32,), frozenset()))
    assert InlineDialect().run(network, context) == 1
    graph.opset_imports.pop(DOMAIN)
    session = onnxruntime.InferenceSession(ir.to_proto(network.model).SerializeToString())
    got = session.run(None, dict(zip(names, operands, strict=True)))
    for array, (dtype, shape) in zip(got, declared, strict=True):
        assert array.dtype == dtype.numpy()
        known = [(extent, want) for extent, want in zip(array.shape, shape, strict=True) if isinstance(want, int)]
        assert all(extent == want for extent, want in known), f"{array.shape} declared as {shape}"
    return list(got)


def _extents(operand: np.ndarray, static: bool) -> list[int | str]:
    """Matrices and vectors are weights or lengths: their extents are known, but for a vector of lengths and for ids."""
    if operand.dtype == np.int64:
        return ["batch", "sequence"][: operand.ndim]
    if static or operand.ndim < 3:
        return list(operand.shape)
    return [*["batch", "sequence"][:DYNAMIC], *operand.shape[DYNAMIC:]]
