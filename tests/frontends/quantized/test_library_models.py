"""Whole models that the libraries quantized: their weights and logits here are those of the libraries' own loaders."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from trtllm.compiler.pipeline import build_engine
from trtllm.config import build_config
from trtllm.frontends.detect import open_model
from trtllm.runtime.perplexity import scoring_session

FIXTURES = Path(__file__).parent / "fixtures" / "models"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
EXACT = [name for name in NAMES if name != "bitsandbytes_int8"]  # which the library divides by 127 in another order


@pytest.fixture
def model(request, tmp_path):
    """The directory as the library wrote it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        shutil.copy(FIXTURES / request.param / file, folder / file)
    return folder


def expected_of(name):
    with safe_open(FIXTURES / name / "expected.safetensors", "numpy") as file:
        return file.get_tensor("tokens"), file.get_tensor("logits"), file.metadata()


def logits_of(engine, tokens):
    session = scoring_session(engine, 64)
    tables = [np.arange(session.info.cache.num_blocks, dtype=np.int32)[None] for _ in session.info.cache.groups]
    count = len(tokens)
    zero = np.asarray([0])
    return session.step(tokens, np.arange(count), np.asarray([0, count]), zero, np.arange(count), tables).copy()


def test_every_family_is_there():
    assert {name.split("_")[0] for name in NAMES} == {"awq", "bitsandbytes", "compressed", "gptq"}


@pytest.mark.parametrize(("model", "name"), [(name, name) for name in EXACT], indirect=["model"])
def test_dequantized_weights_are_the_library_s_bit_for_bit(model, name):
    hashes = expected_of(name)[2]
    assert len(hashes) == 7
    tensors = open_model(model).tensors
    for weight, digest in hashes.items():
        rows = np.ascontiguousarray(tensors[weight].read())
        assert rows.dtype == np.float32 and hashlib.sha256(rows.tobytes()).hexdigest() == digest, weight


@pytest.mark.parametrize(("model", "name"), [(name, name) for name in NAMES], indirect=["model"])
def test_logits_are_those_of_the_library_s_loader(model, name, tmp_path):
    options = {"max_seq_len": 64, "max_batch_size": 1}
    tokens, expected, _ = expected_of(name)
    full = logits_of(build_engine(model, tmp_path / "full", build_config({**options, "dequantize": True})), tokens)
    # float32 sums of 64 products in another order, through one layer: some tens of roundings
    np.testing.assert_allclose(full, expected, atol=64 * 2.0**-24 * np.abs(expected).max())
    kept = logits_of(build_engine(model, tmp_path / "kept", build_config(options)), tokens)
    # activations are rounded to 8 bits, 0.7 % a product, and what has no integers of its own to 8 bits too
    assert np.linalg.norm(kept - expected) / np.linalg.norm(expected) < 0.05
