"""The plan tells what a version runs as it is, what by other operators, and what it refuses, without the library."""

import json
import sys

import pytest

from trtllm.compiler.pipeline import compile_network, plan_build
from trtllm.config import build_config
from trtllm.errors import UnsupportedModelError, UsageError
from trtllm.frontends.detect import open_model
from trtllm.tools.build_report import plan_lines


@pytest.fixture(autouse=True)
def no_library(monkeypatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)


def _plan(model, version, **options):
    settings = {"target": "tensorrt", "tensorrt_version": version, "max_seq_len": 32, **options}
    return plan_build(open_model(model), build_config(settings))


def test_attention_is_native_from_10_15_on_and_spelled_out_before(tiny_checkpoint) -> None:
    fates = {}
    for version in ("8.6", "9.3", "10.4", "10.15", "11.1", "rtx-1.7"):
        plan = json.loads(json.dumps(_plan(tiny_checkpoint, version).to_json()))
        (attention,) = [entry for entry in plan["operators"] if entry["operator"] == "trtllm.Attention"]
        assert attention["count"] == 2 and attention["fate"] == "legalized"
        fates[version] = attention["becomes"]
    for version in ("8.6", "9.3", "10.4"):
        assert "Attention" not in fates[version] and {"Gather", "MatMul", "Exp"} <= fates[version].keys()
    for version in ("10.15", "11.1", "rtx-1.7"):
        assert fates[version]["Attention"] == 2 and fates[version]["TensorScatter"] == 4


def test_products_stay_as_they_are(tiny_checkpoint) -> None:
    entries = {entry.operator: entry for entry in _plan(tiny_checkpoint, "8.6").operators}
    assert entries["trtllm.Linear"].fate == "native" and not entries["trtllm.Linear"].becomes


def test_the_lines_name_the_release_and_what_it_refuses(tiny_checkpoint) -> None:
    said = "\n".join(plan_lines(_plan(tiny_checkpoint, "8.6")))
    assert "TensorRT 8.6 to 8.x" in said and "legalized     trtllm.Attention 2, by " in said
    assert "refused       weight_streaming: it came with TensorRT 10.1" in said


def test_what_cannot_be_planned_is_said_at_once(tiny_checkpoint) -> None:
    with pytest.raises(UsageError) as caught:
        _plan(tiny_checkpoint, "8.6", strip_plan=True, weight_streaming=True)
    assert "strip_plan" in caught.value.what and "weight_streaming" in caught.value.what
    with pytest.raises(UnsupportedModelError, match="does not run quantization FP8"):
        _plan(tiny_checkpoint, "8.6", quantization="FP8")


def test_another_target_has_operators_and_no_release(tiny_checkpoint) -> None:
    compiled = compile_network(open_model(tiny_checkpoint), build_config({"max_seq_len": 32}))
    assert compiled.operators and not compiled.target.capabilities.release
