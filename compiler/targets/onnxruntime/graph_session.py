"""Runs a small network in onnxruntime as it stands, every dialect operator by its reference body."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.compiler.ir.dialect import DOMAIN
from trtllm.compiler.ir.network import Network
from trtllm.config import build_config
from trtllm.dtypes import DType
from trtllm.passes.base import PassContext
from trtllm.passes.inline_dialect import InlineDialect

_REFERENCE = Capabilities("reference", frozenset(), (DType.FLOAT32,), frozenset())


class GraphSession:
    """A network whose weights are inputs, ready to run."""

    def __init__(self, network: Network, *, threads: int = 0) -> None:
        """Takes the network over: its dialect operators are inlined."""
        import onnxruntime

        InlineDialect().run(network, PassContext(build_config({}), _REFERENCE))
        network.model.opset_imports.pop(DOMAIN, None)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.inputs = {value.name: value for value in network.graph.inputs}
        self._session = onnxruntime.InferenceSession(
            ir.to_proto(network.model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, feeds: Mapping[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        """The outputs asked for, by name."""
        wanted = {name: array for name, array in feeds.items() if name in self.inputs}
        return [np.asarray(result) for result in self._session.run(outputs, wanted)]
