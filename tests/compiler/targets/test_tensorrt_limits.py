"""What the tensorrt target says it cannot do, at once and before it starts; none of it needs the library."""

import onnx_ir as ir
import pytest

from trtllm.compiler.ir.builder import OPSET, GraphBuilder
from trtllm.compiler.ir.network import CacheLayer, ModelInfo
from trtllm.compiler.targets.checks import check_graph, check_options
from trtllm.compiler.targets.onnxruntime.capabilities import CAPABILITIES as ONNXRUNTIME
from trtllm.compiler.targets.tensorrt import library
from trtllm.compiler.targets.tensorrt.capabilities import CAPABILITIES
from trtllm.compiler.targets.tensorrt.diagnostics import readable
from trtllm.compiler.targets.tensorrt.profiles import profiles, shapes_in
from trtllm.config import build_config
from trtllm.dtypes import DType
from trtllm.errors import TargetError, UnsupportedModelError, UsageError

DECODER = ModelInfo("decoder", "Tiny", 8, 8, 1, 64, (CacheLayer(1, 8),))
ENCODER = ModelInfo("encoder", "Tiny", 8, 8, 1, 64)


def test_everything_that_a_graph_lacks_is_said_at_once() -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET})
    b = GraphBuilder(graph)
    x = b.input("x", DType.FLOAT32, ("batch", "pages"))
    past = b.input("past_key.0", DType.FLOAT64, ("batch", 2, "sequence", 8))
    for number in range(5):
        x = b.op("Einsum", [x], name=f"layers.{number}.mix")
    x = b.op("MatMulNBits", [x], domain="com.microsoft", name="packed")
    b.output(b.op("Add", [x, b.op("Cast", [past], None, DType.FLOAT32)]), "y")
    with pytest.raises(UnsupportedModelError) as caught:
        check_graph(graph, CAPABILITIES)
    said = caught.value.what
    assert "no operator Einsum (layers.0.mix, layers.1.mix, layers.2.mix and 2 more)" in said
    assert "no operator com.microsoft.MatMulNBits (packed)" in said
    assert "'past_key.0' is DOUBLE" in said
    assert "extent 1 of input 'x' varies by 'pages'" in said
    assert "the cache 'past_key.0' has no constant length" in said


def test_everything_that_a_build_may_not_ask_is_said_at_once() -> None:
    build = build_config({"target": "tensorrt", "strip_plan": True, "compute_capabilities": ("86", "90")})
    with pytest.raises(UsageError) as caught:
        check_options(build, CAPABILITIES)
    assert "strip_plan (without a GPU" in caught.value.what
    assert "90 is none of 75, 80, 86, 89, 120, 121 (TensorRT-RTX does not run on H100" in caught.value.what
    assert "86 is none" not in caught.value.what


def test_an_option_of_another_target_is_refused() -> None:
    with pytest.raises(UsageError, match="it takes no weight_streaming"):
        check_options(build_config({"weight_streaming": True}), ONNXRUNTIME)
    check_options(build_config({}), ONNXRUNTIME)


def test_a_missing_library_is_an_error_with_its_pip_command() -> None:
    absent = library.Flavour("tensorrt-none", "trtllm_no_such_library", "tensorrt-none", "1.0")
    with pytest.raises(TargetError, match=r"pip install 'tensorrt-rtx>=1\.7") as caught:
        library.load([absent])
    assert caught.value.exit_code == 5


def test_a_library_that_is_too_old_is_an_error(monkeypatch) -> None:
    import types

    old = types.SimpleNamespace(__version__="1.5.0.9")
    monkeypatch.setattr(library.importlib, "import_module", lambda _: old)
    with pytest.raises(TargetError, match=r"1\.5\.0\.9 is too old, the tensorrt target needs 1\.7"):
        library.load()


@pytest.mark.parametrize(
    ("options", "context", "generation"),
    [
        ({}, ((1, 1, 8), (1, 256, 512)), ((1, 4, 8), (1, 1, 1))),
        ({"max_num_tokens": 1024}, ((1, 1, 2), (1, 256, 512)), ((1, 4, 8), (1, 1, 1))),
        ({"max_num_tokens": 100}, ((1, 1, 1), (1, 50, 100)), ((1, 4, 8), (1, 1, 1))),
        ({"opt_batch_size": 2, "opt_num_tokens": 64}, ((1, 2, 8), (1, 32, 512)), ((1, 2, 8), (1, 1, 1))),
        ({"max_batch_size": 1}, ((1, 1, 1), (1, 256, 512)), ((1, 1, 1), (1, 1, 1))),
    ],
)
def test_profiles_follow_the_build(options, context, generation) -> None:
    build = build_config({"max_input_len": 512, "max_seq_len": 1024, **options})
    found = profiles(DECODER, build)
    assert [(entry.batch, entry.sequence) for entry in found] == [context, generation]
    assert [entry.name for entry in profiles(ENCODER, build)] == ["context"]


def test_a_cache_keeps_its_length_in_every_profile() -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET})
    cache = GraphBuilder(graph).input("past_key.0", DType.FLOAT16, ("batch", 2, 1024, 8))
    entry = profiles(DECODER, build_config({"max_input_len": 512}))[1]
    assert shapes_in(cache, entry) == ((1, 2, 1024, 8), (4, 2, 1024, 8), (8, 2, 1024, 8))


def test_messages_of_the_library_lose_their_source_files() -> None:
    said = "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (a: no kernel. In build at /_src/x.cpp:3)"
    assert "/_src" not in readable(said) and "no kernel" in readable(said)
