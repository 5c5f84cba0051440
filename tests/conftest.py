"""Fixtures that many rooms share: the models that `make models` fetched."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _cached_model(name: str) -> Path:
    path = Path(os.environ.get("TRTLLM_MODELS") or "~/.cache/trtllm/models").expanduser() / name
    if not path.exists():
        pytest.skip(f"{path} is not there: run `make models`")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as one GGUF file, Q4_1."""
    return _cached_model("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def minilm_directory() -> Path:
    """all-MiniLM-L6-v2 as a Hugging Face directory."""
    return _cached_model("all-MiniLM-L6-v2")


@pytest.fixture(scope="session")
def synthetic() -> ModuleType:
    """tools/dev/make_synthetic.py: Llama checkpoints of any size with random weights."""
    path = Path(__file__).parents[1] / "tools" / "dev" / "make_synthetic.py"
    spec = importlib.util.spec_from_file_location("make_synthetic", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_synthetic"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_checkpoint(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers in one safetensors file. Not to be changed: copy it first."""
    folder = tmp_path_factory.mktemp("synthetic") / "tiny"
    synthetic.write_checkpoint(synthetic.PRESETS["tiny"], folder)
    return folder
