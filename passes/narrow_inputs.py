"""A pass that makes a graph's integer inputs and outputs 32 bits wide, for engines that take no others."""

from __future__ import annotations

import onnx_ir as ir

from trtllm.compiler.ir.network import Network
from trtllm.dtypes import DType
from trtllm.passes.base import Pass, PassContext, builder_before

I64, I32 = ir.DataType.INT64, ir.DataType.INT32


class NarrowInputs(Pass):
    """Convert int64 inputs on their way in and int64 outputs on their way out.

    x = Embedding(input_ids)   with input_ids int64     becomes     x = Embedding(Cast(input_ids))   with int32

    Inside the graph they stay int64, as ONNX has its shapes and indices; an engine without int64 computes in int32.
    """

    name = "narrow-inputs"

    def run(self, network: Network, context: PassContext) -> int:
        if not context.capabilities.narrows_integers:
            return 0
        graph = network.graph
        wide_inputs = [value for value in graph.inputs if value.dtype == I64]
        wide_outputs = [value for value in graph.outputs if value.dtype == I64]
        for value in wide_inputs:
            users = list(value.uses())
            value.type = ir.TensorType(I32)
            if users:
                b = builder_before(network, next(iter(graph)))
                wide = b.op("Cast", [value], None, DType.INT64, name=f"{value.name}.wide", to=I64)
                for use in users:
                    use.node.replace_input_with(use.idx, wide)
        for value in wide_outputs:
            producer = value.producer()
            assert producer is not None, "an integer output is computed"
            name, value.name = value.name, f"{value.name}.wide"
            node = ir.node("Cast", [value], {"to": int(I32)}, name=f"{name}.narrow")
            graph.append(node)
            narrow = node.outputs[0]
            narrow.name, narrow.shape, narrow.type = name, value.shape, ir.TensorType(I32)
            graph.outputs[list(graph.outputs).index(value)] = narrow
        return len(wide_inputs) + len(wide_outputs)
