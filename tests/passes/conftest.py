"""Small networks with random weights, and running them as they stand: dialect operators by their reference bodies."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest

from trtllm.checkpoints.checkpoint import FunctionTensor, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import Source
from trtllm.compiler.ir.builder import OPSET, GraphBuilder
from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.compiler.ir.dialect import DOMAIN
from trtllm.compiler.ir.network import ModelInfo, Network
from trtllm.compiler.ir.verifier import verify
from trtllm.compiler.ir.weights import Weight
from trtllm.config import BuildConfig
from trtllm.dtypes import DType
from trtllm.passes.base import PassContext
from trtllm.runtime.sessions.onnxruntime_library import register_operators

NO_OPERATORS = Capabilities("reference", frozenset(), (DType.FLOAT32,), frozenset({"W8A16", "W4A16"}))


class SmallNetwork:
    """A graph under construction, with a random checkpoint behind its weights."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.tensors: dict[str, FunctionTensor] = {}
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: 1}, name="small")
        self.b = GraphBuilder(self.graph)

    def weight(self, name: str, *shape: int) -> ir.Value:
        array = self.random.normal(size=shape).astype(np.float32)
        spec = TensorSpec(name, shape, DType.FLOAT32)
        self.tensors[name] = FunctionTensor(spec, lambda start, stop: array[start:stop].copy())
        return self.b.weight(name, Source.of(spec))

    def finish(self) -> Network:
        info = ModelInfo("decoder", "Small", 8, 8, 1, 16)
        network = Network(ir.Model(self.graph, ir_version=11), info)
        verify(network.graph, after="the test")
        return network


@pytest.fixture
def small() -> SmallNetwork:
    return SmallNetwork()


@pytest.fixture
def context() -> PassContext:
    return make_context()


@pytest.fixture
def context_for() -> Callable[..., PassContext]:
    return make_context


def make_context(*operators: str, packed: bool = False, **build: object) -> PassContext:
    capabilities = Capabilities(
        "test", frozenset(operators), (DType.FLOAT32,), frozenset({"W8A16", "W4A16"}), packed_int4=packed
    )
    return PassContext(BuildConfig(**build), capabilities)  # type: ignore[arg-type]


@pytest.fixture
def evaluate() -> Callable[[SmallNetwork, Network, Mapping[str, np.ndarray]], list[np.ndarray]]:
    """Runs a copy of a network in onnxruntime, every dialect operator by its body."""

    def run(small: SmallNetwork, network: Network, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        import onnxruntime

        from trtllm.passes.inline_dialect import InlineDialect

        for value in network.graph.initializers.values():
            if isinstance(value.const_value, Weight):
                value.const_value.bind(RecipeReader(small.tensors))
        copy = Network(ir.from_proto(ir.to_proto(network.model)), network.info)
        InlineDialect().run(copy, PassContext(BuildConfig(), NO_OPERATORS))
        copy.model.opset_imports.pop(DOMAIN, None)
        copy.model.opset_imports["com.microsoft"] = 1
        copy.model.opset_imports["trtllm.cpu"] = 1
        options = onnxruntime.SessionOptions()
        register_operators(options)
        session = onnxruntime.InferenceSession(ir.to_proto(copy.model).SerializeToString(), options)
        return [np.asarray(result) for result in session.run(None, dict(feeds))]

    return run


@pytest.fixture
def operators() -> Callable[[Network], list[str]]:
    """The operator types of a network, in order."""
    return lambda network: [node.op_type for node in network.graph]
