"""Whole directories in each method become engines that keep what they store, and compute near their full precision."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trtllm.compiler.engine import open_engine
from trtllm.compiler.pipeline import build_engine
from trtllm.config import build_config
from trtllm.errors import BadInputError, UnsupportedModelError
from trtllm.frontends.detect import open_model
from trtllm.runtime.perplexity import scoring_session, window_logits

GROUP = 32
TOKENS = np.random.default_rng(0).integers(0, 96, 48)
CONFIGS = {
    "awq": {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True},
    "gptq": {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": False},
    "compressed-tensors": {"format": "int-quantized"},
    "fp8": {"weight_block_size": [32, 32]},
}


def parts(method, weight):
    """The tensors of a layer [N, K], rounded in the plainest way."""
    rows, columns = weight.shape
    if method == "compressed-tensors":
        scale = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / 127
        return {"weight": np.rint(weight / scale).astype(np.int8), "weight_scale": scale}
    if method == "fp8":
        import ml_dtypes

        ones = np.ones((-(-rows // 32), -(-columns // 32)), np.float32)
        return {"weight": weight.astype(ml_dtypes.float8_e4m3fn), "weight_scale_inv": ones}
    groups = weight.reshape(rows, -1, GROUP)
    low, high = groups.min(axis=2), groups.max(axis=2)
    scales = ((high - low) / 15).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 1, 15).astype(np.int64)
    integers = np.rint(groups / scales.astype(np.float32)[..., None]) + zeros[..., None]
    integers = np.clip(integers, 0, 15).astype(np.int64).reshape(rows, columns)
    order = [0, 2, 4, 6, 1, 3, 5, 7] if method == "awq" else range(8)

    def words(numbers):
        return sum(numbers.reshape(len(numbers), -1, 8)[:, :, c] << (4 * i) for i, c in enumerate(order))

    stored_zeros = zeros.T - (method == "gptq")
    qweight = words(integers.T) if method == "awq" else words(integers).T
    return {
        "qweight": np.ascontiguousarray(qweight).astype(np.uint32).view(np.int32),
        "qzeros": np.ascontiguousarray(words(stored_zeros)).astype(np.uint32).view(np.int32),
        "scales": np.ascontiguousarray(scales.T),
    }


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A tiny Llama whose extents are multiples of 32."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("published")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def quantized(published, tmp_path):
    """`quantized(method)`: the directory of that model with its layers' linear weights in another form."""

    def make(method, **config):
        folder = tmp_path / f"{method}-model"
        folder.mkdir()
        tensors = {}
        for name, array in load_file(published / "model.safetensors").items():
            if name.endswith("_proj.weight"):
                made = parts(method, array)
                tensors |= {f"{name.removesuffix('weight')}{ending}": part for ending, part in made.items()}
            else:
                tensors[name] = array
        save_file(tensors, folder / "model.safetensors")
        values = json.loads((published / "config.json").read_text())
        values["quantization_config"] = {"quant_method": method, **CONFIGS[method], **config}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


def logits(model, folder, **options):
    build_engine(model, folder, build_config({"max_seq_len": 64, "max_batch_size": 1, **options}))
    engine = open_engine(folder)
    return np.concatenate([piece.copy() for piece in window_logits(scoring_session(engine, 64), TOKENS, 64)]), engine


@pytest.mark.parametrize("method", CONFIGS)
def test_an_engine_of_stored_weights_is_near_full_precision(quantized, tmp_path, method):
    model = quantized(method)
    exact, full = logits(model, tmp_path / "full", dequantize=True)
    kept, engine = logits(model, tmp_path / "kept")
    # Activations are rounded to half of 1/127 of a block's largest, about three times its root mean square: 0.7 % a
    # product. Nine products on the way add up as a random walk, to 2 %; a weight put together wrongly is off by all.
    assert np.linalg.norm(kept - exact) / np.linalg.norm(exact) < 0.05
    notes = json.loads((engine.path / "config.json").read_text())["notes"]
    if method == "fp8":
        assert any("14 weights dequantized: no integers express it" in note for note in notes)
        np.testing.assert_array_equal(kept, exact)
    else:
        assert any(": 14 weights kept" in note for note in notes)
        assert engine.nbytes < full.nbytes
    assert any("dequantized, as asked" in n for n in json.loads((full.path / "config.json").read_text())["notes"])


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_the_full_engine_computes_what_the_rule_of_the_format_gives(quantized, published, tmp_path, method):
    """Held against the published model with the same layers rounded here, element by element of the rule."""
    from trtllm.checkpoints.safetensors_file import SafetensorsFile

    read = open_model(quantized(method)).tensors
    file = SafetensorsFile(published / "model.safetensors")
    for name in file.specs:
        weight = file.tensor(name).read()
        if not name.endswith("_proj.weight"):
            np.testing.assert_array_equal(read[name].read(), weight)
            continue
        steps = weight.reshape(len(weight), -1, GROUP).max(axis=2) - weight.reshape(len(weight), -1, GROUP).min(axis=2)
        # half a step of a fifteenth for the integer, half for the zero point, and what float16 does to the scale
        bound = (steps / 15).repeat(GROUP, axis=1) * 1.02
        assert (np.abs(read[name].read() - weight) <= bound).all(), name


def test_a_group_size_of_another_model_is_refused(quantized):
    with pytest.raises(BadInputError) as caught:
        open_model(quantized("gptq", group_size=64))
    assert len(str(caught.value).splitlines()) == 2


def test_a_cut_file_is_refused(quantized):
    file = quantized("awq") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInputError, match="cut short"):
        open_model(file.parent)


def test_a_quantized_model_in_memory_is_refused(published):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(published)
    model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(UnsupportedModelError, match="a model in memory"):
        open_model(model)
