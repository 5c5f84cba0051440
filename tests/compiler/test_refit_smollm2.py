"""Refit of SmolLM2: a fine-tune equals its fresh build by hash and by 64 greedy tokens; so does the pruned engine."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from trtllm import LLM, SamplingParams
from trtllm.checkpoints.selection import Selection
from trtllm.compiler.engine import Engine, open_engine
from trtllm.compiler.pipeline import compile as compile_engine
from trtllm.compiler.refit.refit import RefitOptions, refit_engine
from trtllm.compiler.stripping import strip_engine
from trtllm.config import BuildConfig
from trtllm.frontends.detect import open_model
from trtllm.quantization import SCHEMES, CalibratedWeightOnly

GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time there was a lighthouse keeper who"]


@pytest.fixture(scope="module")
def models(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model as float32 safetensors, and with every weight perturbed by a fiftieth of itself."""
    checkpoint = open_model(smollm2_gguf)
    random = np.random.default_rng(5)
    folders = []
    for name, scale in (("base", 0.0), ("tuned", 0.02)):
        folder = tmp_path_factory.mktemp("smollm2") / name
        folder.mkdir()
        tensors = {}
        for key, tensor in checkpoint.tensors.items():
            values = tensor.read().astype(np.float32)
            noise = random.standard_normal(values.shape, np.float32) if scale else np.float32(0)
            tensors[key] = (values * (1 + np.float32(scale) * noise)).astype(np.float32)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = dict(checkpoint.config) | {"architectures": [checkpoint.architecture]}
        (folder / "config.json").write_text(json.dumps(config, default=str))
        for asset, content in checkpoint.assets.items():
            (folder / asset).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
        folders.append(folder)
    return folders[0], folders[1]


def hashes(engine: Engine) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in open_engine(engine.path, verify=True).manifest.weights}


def tokens(engine: Engine) -> list[list[int]]:
    with LLM(engine.path) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, "W8A16", "W4A16", "FP8", "W4A16_GPTQ"])
def test_smollm2_refitted_is_smollm2_built(models: tuple[Path, Path], tmp_path: Path, scheme: str | None) -> None:
    """Where calibration chooses, 8 rows of 256 tokens of the package's text do."""
    kind = SCHEMES[scheme] if scheme else None
    by_calibration = isinstance(kind, CalibratedWeightOnly)
    recalibrates = by_calibration or bool(getattr(kind, "needs_ranges", False))
    config = BuildConfig(quantization=scheme, calib_size=8, calib_max_seq_length=256)

    def build(model: Path, name: str) -> Engine:
        return compile_engine(model, output_dir=tmp_path / name, max_seq_len=128, max_batch_size=4, config=config)

    engine, fresh = build(models[0], "engine"), build(models[1], "fresh")
    refitted = refit_engine(engine, models[1], options=RefitOptions(recalibrate=recalibrates))
    assert refitted.verification is not None
    assert refitted.verification.error == 0
    assert hashes(refitted.engine) == hashes(fresh)
    before = tokens(engine)
    assert tokens(refitted.engine) == tokens(fresh) != before
    stripped = strip_engine(engine, tmp_path / "stripped", Selection(everything=True))
    whole = refit_engine(stripped, models[0], tmp_path / "whole", options=RefitOptions(recalibrate=by_calibration))
    assert hashes(whole.engine) == hashes(engine)
    assert tokens(whole.engine) == before
