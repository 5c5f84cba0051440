"""Real plans of tiny models, built without a GPU: every type, level and architecture, and what is refused."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler import pipeline
from trtllm.compiler.calibration.calibrate import Calibration
from trtllm.compiler.engine import ENGINE, open_engine
from trtllm.compiler.models.table import ARCHITECTURES
from trtllm.compiler.pipeline import build_engine, compile_network, read_model
from trtllm.config import build_config
from trtllm.errors import TargetError, UnsupportedModelError, UsageError
from trtllm.progress import Silent
from trtllm.runtime.session import open_session

pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx to build plans")
pytestmark = pytest.mark.tensorrt


def build(model: Any, folder: Path, **options: object) -> Any:
    settings = {"target": "tensorrt", "max_batch_size": 4, "max_seq_len": 48, "max_input_len": 32, **options}
    return build_engine(model, folder / "engine", build_config(settings))


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [
        ("float32", None),
        ("float16", None),
        ("bfloat16", None),
        ("float16", "W8A16"),
        ("bfloat16", "W4A16"),
        ("float32", "W4A16"),
    ],
)
def test_a_plan_is_built_in_every_type(tiny_model, tmp_path, dtype, quantization, level) -> None:
    model = tiny_model("LlamaForCausalLM", tie_word_embeddings=True)
    engine = build(model, tmp_path, dtype=dtype, quantization=quantization, optimization_level=level)
    assert open_engine(engine.path).manifest.files[ENGINE].nbytes > 100_000
    assert {file.name for file in engine.path.iterdir()} >= {ENGINE, "manifest.json", "config.json", "recipes.json"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "quantization",
    ["FP8", "NVFP4", "W4A16_MXFP4", "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN"],
)
def test_small_formats_become_plans(tiny_model, tmp_path, monkeypatch, quantization, dtype) -> None:
    monkeypatch.setattr(pipeline, "calibrated", lambda *_, **__: Calibration())  # these models have no tokenizer
    model = tiny_model("LlamaForCausalLM")
    engine = build(model, tmp_path, quantization=quantization, dtype=dtype)
    assert engine.manifest.files[ENGINE].nbytes > 100_000
    names = {weight.name for weight in engine.manifest.weights}
    assert any(name.endswith("_values") for name in names) and any(name.endswith("_scales") for name in names)


@pytest.mark.parametrize("quantization", ["FP8_BLOCK_SCALES", "W8A8", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_formats_without_a_layer_are_refused_by_name(tiny_model, tmp_path, quantization) -> None:
    with pytest.raises(UnsupportedModelError, match=f"does not run quantization {quantization}"):
        build(tiny_model("LlamaForCausalLM"), tmp_path, quantization=quantization)


def test_a_gpu_without_the_format_is_refused(tiny_model, tmp_path) -> None:
    with pytest.raises(UsageError, match="FP8 needs compute capability 89, 86 has no products in its format"):
        build(tiny_model("LlamaForCausalLM"), tmp_path, quantization="FP8", compute_capabilities=("86", "89"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_becomes_a_plan(tiny_model, tmp_path, architecture) -> None:
    engine = build(tiny_model(architecture), tmp_path)
    assert engine.manifest.files[ENGINE].nbytes > 100_000


def test_the_manifest_tells_what_is_in_the_plan(tiny_model, tmp_path) -> None:
    model = tiny_model("LlamaForCausalLM")
    engine = build(model, tmp_path, quantization="W4A16", compute_capabilities=("86", "89"))
    target = engine.manifest.target
    assert (target.name, target.flavour, target.compute_capabilities) == ("tensorrt", "tensorrt-rtx", ("86", "89"))
    assert [(entry.name, entry.batch[2], entry.sequence[2]) for entry in target.profiles] == [
        ("context", 4, 32),
        ("generation", 4, 1),
    ]
    checkpoint = read_model(model, progress=Silent())
    options = {"target": "tensorrt", "quantization": "W4A16", "max_seq_len": 48}
    reader = RecipeReader(checkpoint.tensors)
    payloads = {
        weight.name: reader.read(weight.recipe) for weight in compile_network(checkpoint, build_config(options)).weights
    }
    assert [weight.name for weight in engine.manifest.weights] == list(payloads)
    for weight in engine.manifest.weights:
        assert weight.sha256 == hashlib.sha256(np.ascontiguousarray(payloads[weight.name]).tobytes()).hexdigest()
        assert (weight.file, weight.nbytes) == (ENGINE, payloads[weight.name].nbytes)


def test_a_tied_head_is_stored_once(tiny_model, tmp_path) -> None:
    sizes = []
    for tied in (True, False):
        model = tiny_model("LlamaForCausalLM", tie_word_embeddings=tied, vocab_size=20_000)
        sizes.append(build(model, tmp_path / str(tied)).manifest.files[ENGINE].nbytes)
    assert sizes[1] - sizes[0] > 0.9 * 20_000 * 64 * 2


@pytest.mark.parametrize(
    "options",
    [
        {"builder_optimization_level": 0},
        {"profiling_verbosity": "detailed"},
        {"tensorrt_workspace_mb": 256},
        {"weight_streaming": True},
        {"gather_context_logits": True},
    ],
)
def test_the_builder_takes_its_options(tiny_model, tmp_path, options) -> None:
    assert build(tiny_model("LlamaForCausalLM"), tmp_path, **options).target == "tensorrt"


def test_progress_reaches_the_end_of_the_plan(tiny_model, tmp_path) -> None:
    class Recorder(Silent):
        def __init__(self) -> None:
            self.stages: list[list[Any]] = []

        def stage(self, name: str, total: int | None = None) -> None:
            self.stages.append([name, total, 0])

        def advance(self, amount: int) -> None:
            self.stages[-1][2] += amount

    recorder = Recorder()
    settings = build_config({"target": "tensorrt", "max_seq_len": 32})
    build_engine(tiny_model("LlamaForCausalLM"), tmp_path / "engine", settings, progress=recorder)
    whole = {name: (total, done) for name, total, done in recorder.stages}
    assert whole["reading weights"][0] == whole["reading weights"][1] > 0
    assert whole["building the plan"][0] == whole["building the plan"][1] > 0


def test_a_refused_layer_is_named_and_leaves_nothing_behind(tiny_model, tmp_path, monkeypatch) -> None:
    from trtllm.compiler.targets.tensorrt.operators import table

    def broken(e: Any, node: Any) -> list[Any]:
        return [e.binary(e.of(node.inputs[0]), e.integers([1, 2, 3]), "SUM")]

    monkeypatch.setitem(table.OPERATORS, "::RMSNormalization", broken)
    with pytest.raises(TargetError, match=r"tensorrt-rtx refuses RMSNormalization '.*norm.*':") as caught:
        build(tiny_model("LlamaForCausalLM"), tmp_path)
    assert caught.value.exit_code == 5 and str(caught.value).count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_runtime_says_that_it_cannot_run_the_plan_here(tiny_model, tmp_path) -> None:
    with pytest.raises(TargetError, match="is a TensorRT plan of a form that has no session"):
        open_session(build(tiny_model("LlamaForCausalLM"), tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", [None, "W4A16"])
def test_the_whole_smollm2_becomes_a_plan(smollm2_gguf, tmp_path, quantization) -> None:
    engine = build(smollm2_gguf, tmp_path, quantization=quantization, max_seq_len=1024, max_input_len=512)
    megabytes = engine.manifest.files[ENGINE].nbytes / 1e6
    # 134.5 million weights in float16 are 269 MB with the shared embedding stored once; a second copy makes 326.
    assert (260 if quantization is None else 130) < megabytes < (315 if quantization is None else 210)
