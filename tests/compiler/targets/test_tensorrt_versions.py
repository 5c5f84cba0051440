"""Every architecture is legal on every range of versions, and what is emitted uses names that the version has."""

import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm.compiler import pipeline
from trtllm.compiler.models.table import ARCHITECTURES
from trtllm.compiler.pipeline import build_engine, read_model
from trtllm.compiler.targets.tensorrt.capabilities import RELEASES, capabilities_for
from trtllm.compiler.targets.tensorrt.operators.table import OPERATORS
from trtllm.config import build_config
from trtllm.dtypes import DType
from trtllm.errors import UnsupportedModelError
from trtllm.progress import Silent
from trtllm.runtime.sessions import tensorrt_library

from .recording_tensorrt import VERSIONS, Module

OLD, NEW = ("9.3", "10.0", "10.13"), ("10.15", "11.1")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Builds a model with the stand-in of a version; returns the module."""

    def make(version: str, model: Any, **options: Any) -> Module:
        module = Module(version)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr("trtllm.compiler.targets.tensorrt.emit.timing_cache_path", lambda _: None)
        settings = {
            "target": "tensorrt", "tensorrt_version": version, "max_seq_len": 48, "max_batch_size": 2, **options
        }  # fmt: skip
        build_engine(model, tmp_path / f"engine-{version}", build_config(settings))
        return module

    return make


@pytest.mark.parametrize("version", ["9.3", "10.0", "11.1"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_legal_on_every_version(build, tiny_model, architecture, version) -> None:
    dtypes = capabilities_for(version).compute_dtypes
    dtype = dtypes[list(ARCHITECTURES).index(architecture) % len(dtypes)]
    module = build(version, tiny_model(architecture), dtype=dtype.value)
    assert ("add_attention" in module.layers or "add_attention_v2" in module.layers) <= (version in NEW)
    assert "add_matrix_multiply" in module.layers


@pytest.mark.parametrize("version", ["10.13", "10.15"])
def test_versions_within_a_range_have_the_same_names(build, tiny_model, version) -> None:
    module = build(version, tiny_model("LlamaForCausalLM"), dtype="bfloat16")
    assert ("add_attention" in module.layers) == ("add_kv_cache_update" in module.layers) == (version in NEW)


@pytest.mark.parametrize("version", [*OLD, *NEW])
@pytest.mark.parametrize("quantization", ["W4A16", "W8A16"])
def test_weights_in_blocks_are_dequantized_by_the_versions_that_can(build, tiny_model, version, quantization) -> None:
    module = build(version, tiny_model("LlamaForCausalLM"), quantization=quantization)
    assert ("add_dequantize" in module.layers) == (version in NEW)


@pytest.mark.parametrize("version", [*OLD, *NEW])
def test_int8_products_are_rounded_on_every_version(build, tiny_model, monkeypatch, version) -> None:
    model, scheme = tiny_model("LlamaForCausalLM"), "W8A8_SQ_PER_CHANNEL"
    settings = build_config({"target": "tensorrt", "quantization": scheme, "max_seq_len": 48})
    tokens = np.random.default_rng(0).integers(3, 128, (2, 8))
    calibration = pipeline.calibrated(read_model(model, progress=Silent()), settings, Silent(), tokens=tokens)
    monkeypatch.setattr(pipeline, "calibrated", lambda *_, **__: calibration)
    module = build(version, model, quantization=scheme)
    products = 2 * 4  # packed, in two layers
    assert module.layers.count("add_quantize") == products * (2 if version == "9.3" else 1)
    assert module.layers.count("add_dequantize") >= 2 * products


@pytest.mark.parametrize(
    "options",
    [
        {"weight_streaming": True}, {"strip_plan": True}, {"version_compatible": True},
        {"hardware_compatibility_level": "ampere_plus"}, {"builder_optimization_level": 2},
        {"profiling_verbosity": "detailed"}, {"tensorrt_workspace_mb": 512},
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", [*OLD, *NEW])
def test_options_that_a_table_takes_have_names(build, tiny_model, version, options) -> None:
    (name,) = options
    if name not in capabilities_for(version).options:
        pytest.skip(f"{version} takes no {name}")
    build(version, tiny_model("LlamaForCausalLM"), **options)


def test_a_name_that_a_version_lacks_is_an_error() -> None:
    network = Module("9.3").Builder(None).create_network(0)
    with pytest.raises(AttributeError, match=r"no INetworkDefinition\.add_attention"):
        network.add_attention(None)
    assert not hasattr(Module("11.1").BuilderFlag, "FP16") and hasattr(Module("9.3").BuilderFlag, "FP16")


def test_bfloat16_came_with_version_9(tiny_model) -> None:
    checkpoint = read_model(tiny_model("LlamaForCausalLM"), progress=Silent())
    for version in ("8.6", "9.3", "10.0", "11.1", "rtx-1.7"):
        settings = {"target": "tensorrt", "tensorrt_version": version, "max_seq_len": 48, "dtype": "bfloat16"}
        if version != "8.6":
            assert pipeline.compile_network(checkpoint, build_config(settings)).dtype is DType.BFLOAT16
        else:
            with pytest.raises(UnsupportedModelError, match="does not compute in bfloat16"):
                pipeline.compile_network(checkpoint, build_config(settings))


def test_tables_only_name_operators_that_have_layers_and_grow_with_the_versions() -> None:
    full = [release.capabilities for release in RELEASES if release.flavour == "tensorrt"]
    assert all(table.operators <= frozenset(OPERATORS) for table in full)
    assert all(older.operators <= newer.operators for older, newer in pairwise(full))
    assert all(older.schemes <= newer.schemes for older, newer in pairwise(full))
    assert all((table.value_dtypes or set()) >= set(table.compute_dtypes) for table in full)


_EITHER = {"create_execution_context_without_device_memory", "device_memory_size", "device_memory"}
"""What the session asks of versions that lack the newer form."""


@pytest.mark.parametrize("version", VERSIONS)
def test_the_session_uses_names_that_the_version_has(version) -> None:
    source = Path(tensorrt_library.__file__).read_text(encoding="utf-8")
    names = VERSIONS[version]
    for variable, real in (("self._engine", "ICudaEngine"), ("self._context", "IExecutionContext")):
        used = set(re.findall(rf"(?<!\w){re.escape(variable)}\.(\w+)", source))
        assert len(used) > 2
        missing = used - set(names[real])
        assert missing <= _EITHER | {"device_memory_size_v2"}
        assert not ("device_memory_size_v2" in missing and missing & _EITHER)
