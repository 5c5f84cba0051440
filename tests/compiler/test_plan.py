"""Plans of builds: weights and cache exactly, memory and disk near what is measured, refusals with numbers."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from trtllm.checkpoints.evaluation import DEFAULT_CHUNK_BYTES
from trtllm.compiler.pipeline import build_engine, plan_build, prepare_build
from trtllm.compiler.plan import BuildLimits, check_plan
from trtllm.config import build_config
from trtllm.errors import ResourceError
from trtllm.frontends.detect import open_model

SAVED = 10_000_000
"""Bytes below the planned peak that smaller chunks can save."""
MEASURE = """
import sys, json
from pathlib import Path
from trtllm.compiler.pipeline import prepare_build, finish_build
from trtllm.compiler.plan import BuildLimits
from trtllm.config import build_config
from trtllm.memory import peak_memory
model, output, quantization, limit = sys.argv[1:]
limits = BuildLimits(max_memory=int(limit) or None)
prepared = prepare_build(model, build_config({"quantization": quantization or None}), Path(output), limits=limits)
engine = finish_build(prepared, Path(output), limits=limits)
print(json.dumps({"peak": peak_memory(), "planned": prepared.plan.peak_memory,
                  "engine": engine.nbytes, "planned_engine": prepared.plan.engine_bytes,
                  "resident": prepared.plan.resident_memory, "chunk": prepared.plan.chunk_bytes}))
"""


@pytest.mark.parametrize("quantization", [None, "W8A16", "W4A16"])
@pytest.mark.parametrize("level", [0, 2])
def test_weights_are_exact_and_the_directory_near(tiny_checkpoint, tmp_path, quantization, level):
    build = build_config({"quantization": quantization, "optimization_level": level})
    plan = plan_build(open_model(tiny_checkpoint), build)
    engine = build_engine(tiny_checkpoint, tmp_path / "out", build)
    assert plan.weights_bytes == engine.manifest.weights_nbytes
    assert plan.weights == len(engine.manifest.weights)
    assert engine.nbytes <= plan.engine_bytes < engine.nbytes + 200_000


@pytest.mark.parametrize(("level", "tokens"), [(1, 40), (2, 64)])
def test_the_cache_is_counted_for_every_layer_and_slot(tiny_checkpoint, level, tokens):
    """A linear cache has the tokens that were asked for, a paged one whole blocks of 32."""
    options = {"max_batch_size": 3, "max_seq_len": 40, "optimization_level": level}
    plan = plan_build(open_model(tiny_checkpoint), build_config(options))
    assert plan.cache_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers, key and value, heads, head size, float32
    assert plan.cache_bytes == 3 * tokens * plan.cache_bytes_per_token


def test_a_plan_is_json_and_tells_what_passes_do(tiny_checkpoint):
    plan = json.loads(json.dumps(plan_build(open_model(tiny_checkpoint), build_config({})).to_json()))
    assert plan["passes"]["pack-qkv"] == 2
    assert plan["native_operators"] and plan["standard_operators"]
    assert plan["problems"] == []


def test_memory_bounds_the_chunks_and_then_refuses(synthetic_300mb, tmp_path, monkeypatch):
    # What this process holds differs from plan to plan by more than what the test takes away.
    monkeypatch.setattr("trtllm.compiler.plan.resident_memory", lambda: 200 << 20)

    def plan_within(nbytes: int | None):
        build = build_config({"quantization": "W4A16"})
        limits = BuildLimits(max_memory=nbytes)
        return prepare_build(synthetic_300mb, build, tmp_path / "out", limits=limits).plan

    unbounded = plan_within(None)
    assert unbounded.chunk_bytes == DEFAULT_CHUNK_BYTES
    bounded = plan_within(unbounded.peak_memory - SAVED)
    assert bounded.chunk_bytes < DEFAULT_CHUNK_BYTES
    assert bounded.problems == ()
    refused = plan_within(unbounded.resident_memory)
    with pytest.raises(ResourceError, match=r"it needs about .* of memory, --max-build-memory allows"):
        check_plan(refused)


@pytest.mark.slow
@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize("quantization", ["W4A16", ""])
def test_the_planned_peak_is_no_less_than_the_measured_one_and_within_a_half(
    synthetic_300mb, tmp_path, quantization, is_bounded
):
    def measure(limit: int) -> dict[str, int]:
        output = tmp_path / f"out-{limit}"
        arguments = [sys.executable, "-c", MEASURE, str(synthetic_300mb), str(output), quantization, str(limit)]
        result: dict[str, int] = json.loads(subprocess.run(arguments, check=True, capture_output=True).stdout)
        return result

    found = measure(0)
    if is_bounded:
        limit = found["planned"] - SAVED
        found = measure(limit)
        assert found["peak"] <= limit
    assert found["peak"] <= found["planned"] <= 1.5 * found["peak"]
    assert found["engine"] <= found["planned_engine"] <= 1.01 * found["engine"]


@pytest.fixture(scope="module")
def synthetic_300mb(synthetic, tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "300mb"
    synthetic.write_checkpoint(synthetic.PRESETS["300mb"], folder)
    yield folder
    for path in folder.iterdir():
        os.unlink(path)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layers(synthetic, tmp_path):
    peaks = []
    for layers in (2, 16):
        shape = replace(synthetic.PRESETS["300mb"], num_hidden_layers=layers, vocab_size=512)
        synthetic.write_checkpoint(shape, tmp_path / f"model-{layers}")
        arguments = [str(tmp_path / f"model-{layers}"), str(tmp_path / f"out-{layers}"), "W4A16", "0"]
        measured = subprocess.run([sys.executable, "-c", MEASURE, *arguments], check=True, capture_output=True)
        peaks.append(json.loads(measured.stdout)["peak"])
    assert peaks[1] - peaks[0] < 12_000_000, "the graph of 14 layers, not their 130 MB of weights"
