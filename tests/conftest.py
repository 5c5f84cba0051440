"""Fixtures that many rooms share: the models that `make models` fetched."""

import os
from pathlib import Path

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
