"""Weights in small formats and experts are read back from engines as what an independent rounding makes of them."""

import ml_dtypes
import numpy as np
import pytest

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.quantize import dequantize_blocks, quantize_blocks
from trtllm.checkpoints.scaled_recipes import RoundedBy
from trtllm.compiler.inspection.payloads import engine_tensors, matrices
from trtllm.compiler.inspection.quantization_error import full_precision, quantization_errors
from trtllm.compiler.pipeline import build_engine
from trtllm.compiler.refit.recipes import stored_recipes
from trtllm.config import build_config
from trtllm.frontends.in_memory import read_model
from trtllm.progress import Silent

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SCHEMES = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "W8A8", "NVFP4", "W4A16_MXFP4")


def _small(values):
    """The nearest values of e2m1, halves to the even code."""
    gaps = np.abs(np.abs(values)[..., None] - E2M1)
    order = np.argsort(gaps + np.array([0, 1, 0, 1, 0, 1, 0, 1]) * 1e-9, axis=-1)[..., 0]
    return np.sign(values) * E2M1[order]


def _blockwise(weight, rows, columns):
    """Largest magnitudes of blocks, as every element of them has it."""
    result = np.zeros_like(weight)
    for top in range(0, weight.shape[0], rows):
        for left in range(0, weight.shape[1], columns):
            block = np.s_[top : top + rows, left : left + columns]
            result[block] = np.abs(weight[block]).max()
    return result


def _rounded(weight, scheme):
    """What the scheme makes of a weight [N, K], by its definition."""
    rows, columns = weight.shape
    if scheme == "NVFP4":
        factor = np.float32(np.abs(weight).max() / np.float32(6 * 448))
        wanted = _blockwise(weight, 1, 16) / np.float32(6)
        scales = (wanted / factor).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * factor
        return _small(np.clip(weight / scales, -6, 6)) * scales
    if scheme == "W4A16_MXFP4":
        scales = np.exp2(np.floor(np.log2(_blockwise(weight, 1, 32))) - 2)
        return _small(np.clip(weight / scales, -6, 6)) * scales
    block = {"FP8": (rows, columns), "FP8_BLOCK_SCALES": (128, 128)}.get(scheme, (1, columns))
    scales = _blockwise(weight, *block) / np.float32(127 if scheme == "W8A8" else 448)
    quotient = weight / scales
    return (np.rint(quotient) if scheme == "W8A8" else quotient.astype(ml_dtypes.float8_e4m3fn).astype(float)) * scales


@pytest.fixture
def unmeasured(monkeypatch):
    """Models in memory have no tokenizer for a text: activations keep the scale 1, weights are rounded as ever."""
    import trtllm.compiler.pipeline as pipeline

    monkeypatch.setattr(pipeline, "wants_ranges", lambda build: False)


def _engine(model, folder, **options):
    config = build_config({"max_seq_len": 32, "max_batch_size": 1, **options})
    return build_engine(model, folder / "engine", config)


def _full(reader, recipe, tensors):
    return reader.read(full_precision(recipe, tensors))


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_small_format_is_read_back_as_its_rounding(variants, tiny_model, tmp_path, scheme, level, unmeasured) -> None:
    model = tiny_model(variants["llama"])
    engine = _engine(model, tmp_path, quantization=scheme, optimization_level=level)
    checkpoint = read_model(model)
    recipes, reader = stored_recipes(engine), RecipeReader(checkpoint.tensors)
    found = matrices(engine_tensors(engine), recipes)
    scaled = {name: made for name, made in found.items() if "lanes" in name}
    assert len(scaled) == {0: 14, 2: 8}[level]
    for name, made in scaled.items():
        full = _full(reader, recipes[name], checkpoint.tensors)
        expected = _rounded(full, scheme)
        # scales are float32: a quotient within their rounding of the middle of two values may go to either
        actual = made.read(0, made.spec.shape[0])
        ties = np.abs(actual - expected) > 1e-5 * np.abs(expected).max()
        assert ties.mean() < 1e-3
        np.testing.assert_array_equal(made.read(5, 21), actual[5:21])
    errors = quantization_errors(engine, checkpoint, Silent())
    assert errors.unknown == ()
    assert set(errors.by_layer) == {"0", "1", "outside"}
    for item in errors.weights:
        if item.name in scaled:
            full = _full(reader, recipes[item.name], checkpoint.tensors).astype(np.float64)
            expected = np.linalg.norm(_rounded(full.astype(np.float32), scheme) - full) / np.linalg.norm(full)
            assert item.relative_rms == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16"])
@pytest.mark.parametrize(("name", "mixtures"), [("mixtral", 2), ("qwen3-moe", 1)])
def test_experts_are_read_back_as_the_rounding_of_each(variants, tiny_model, tmp_path, scheme, name, mixtures) -> None:
    model = tiny_model(variants[name])
    engine = _engine(model, tmp_path, quantization=scheme)
    checkpoint = read_model(model)
    recipes, reader = stored_recipes(engine), RecipeReader(checkpoint.tensors)
    found = {key: made for key, made in matrices(engine_tensors(engine), recipes).items() if len(made.spec.shape) == 3}
    assert len(found) == 2 * mixtures
    for key, made in found.items():
        full = _full(reader, recipes[key], checkpoint.tensors)
        bits = 4 if scheme == "W4A16" else 8
        for expert in range(len(full)):
            expected = dequantize_blocks(quantize_blocks(full[expert], bits, 32, "float16"), bits)
            np.testing.assert_array_equal(made.read(expert, expert + 1)[0], expected)
    errors = quantization_errors(engine, checkpoint, Silent())
    assert errors.unknown == ()
    assert {item.name for item in errors.weights} >= set(found)


def test_scales_in_a_small_format_are_no_weights(variants, tiny_model, tmp_path, unmeasured) -> None:
    engine = _engine(tiny_model(variants["llama"]), tmp_path, quantization="NVFP4")
    errors = quantization_errors(engine, read_model(tiny_model(variants["llama"])), Silent())
    assert not any("_scales" in item.name for item in errors.weights)


@pytest.mark.parametrize("scheme", ["FP8", "W8A8", "W4A16_MXFP4"])
def test_weights_in_rows_are_read_back_too(variants, tiny_model, tmp_path, unmeasured, scheme) -> None:
    """A graph in float16 has no kernel with tiles for them."""
    model = tiny_model(variants["llama"])
    engine = _engine(model, tmp_path, quantization=scheme, dtype="float16")
    checkpoint = read_model(model)
    recipes, reader = stored_recipes(engine), RecipeReader(checkpoint.tensors)
    found = matrices(engine_tensors(engine), recipes)
    rows = {name: made for name, made in found.items() if isinstance(recipes[name], RoundedBy)}
    assert len(rows) == 8
    for name, made in rows.items():
        expected = _rounded(_full(reader, recipes[name], checkpoint.tensors), scheme)
        off = np.abs(made.read(0, made.spec.shape[0]) - expected) > 1e-5 * np.abs(expected).max()
        assert off.mean() < 1e-3
    assert quantization_errors(engine, checkpoint, Silent()).unknown == ()
