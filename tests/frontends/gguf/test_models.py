"""A model written as GGUF by llama.cpp's rules comes back as the Hugging Face model it was."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from trtllm.dtypes import DType
from trtllm.errors import BadInputError, UnsupportedModelError
from trtllm.frontends.detect import open_model

FAMILIES = [
    "llama", "llama_untied", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3", "gpt2", "bert"
]  # fmt: skip
FLOAT32_ROUNDING = 2e-7  # of w + 1 - 1, |w| < 1
Kind = gguf.GGMLQuantizationType


def _expected(tiny_directory, family):
    tensors = open_model(tiny_directory(family)).tensors
    return {name: tensor.read() for name, tensor in tensors.items() if not name.startswith("pooler.")}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_come_back(write_gguf, tiny_directory, tmp_path, family):
    checkpoint = open_model(write_gguf(tmp_path / "m.gguf", family))
    expected = _expected(tiny_directory, family)
    assert checkpoint.tensors.keys() == expected.keys()
    tolerance = FLOAT32_ROUNDING if family.startswith("gemma") else 0
    for name, array in expected.items():
        assert checkpoint.tensors[name].spec.name == name
        np.testing.assert_allclose(checkpoint.tensors[name].read(), array, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_and_tensors_make_the_same_model(write_gguf, tiny_model, tmp_path, family):
    import transformers

    checkpoint = open_model(write_gguf(tmp_path / "m.gguf", family))
    save_file({name: tensor.read() for name, tensor in checkpoint.tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(checkpoint.config)))
    original = tiny_model(family)
    assert checkpoint.architecture == type(original).__name__
    rebuilt = getattr(transformers, checkpoint.architecture).from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 43).reshape(1, 40)
    with torch.no_grad():
        before, after = original(ids), rebuilt(ids)
    key = "last_hidden_state" if family == "bert" else "logits"
    torch.testing.assert_close(after[key], before[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_rows_of_the_whole(write_gguf, tmp_path, family):
    random = np.random.default_rng(0)
    for tensor in open_model(write_gguf(tmp_path / "m.gguf", family, kind=Kind.Q8_0)).tensors.values():
        whole = tensor.read()
        assert whole.shape == tensor.spec.shape
        assert whole.dtype == tensor.spec.dtype.numpy
        for _ in range(4):
            start, stop = sorted(random.integers(0, whole.shape[0] + 1, 2).tolist())
            np.testing.assert_array_equal(tensor.read(start, stop), whole[start:stop], err_msg=tensor.spec.name)


@pytest.mark.parametrize(
    ("kind", "relative"),
    [(Kind.Q8_0, 1 / 127), (Kind.Q5_1, 1 / 15), (Kind.Q5_0, 1 / 15), (Kind.Q4_1, 1 / 7), (Kind.Q4_0, 1 / 7)],
)  # fmt: skip
def test_quantized_matrices_are_dequantized_and_counted(write_gguf, tiny_directory, tmp_path, kind, relative):
    checkpoint = open_model(write_gguf(tmp_path / "m.gguf", "llama", kind=kind))
    for name, array in _expected(tiny_directory, "llama").items():
        assert checkpoint.tensors[name].spec.dtype is DType.FLOAT32
        limit = relative * np.abs(array).max() if array.ndim > 1 else 0
        np.testing.assert_allclose(checkpoint.tensors[name].read(), array, rtol=0, atol=limit, err_msg=name)
    assert f"quantized: 15 tensors {kind.name}" in checkpoint.notes


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, DType.FLOAT16), (Kind.BF16, DType.BFLOAT16)])
def test_half_precision_stays_what_it_is(write_gguf, tiny_directory, tmp_path, kind, dtype):
    checkpoint = open_model(write_gguf(tmp_path / "m.gguf", "llama", kind=kind))
    name = "model.layers.1.self_attn.k_proj.weight"
    tensor = checkpoint.tensors[name]
    assert tensor.spec.dtype is dtype
    expected = _expected(tiny_directory, "llama")[name].astype(dtype.numpy)
    np.testing.assert_array_equal(tensor.read(), expected)
    assert not any("dequantized" in note for note in checkpoint.notes)


def test_config_has_the_values_of_the_model(write_gguf, tiny_model, tmp_path):
    config = open_model(write_gguf(tmp_path / "m.gguf", "gemma3")).config
    expected = tiny_model("gemma3").config
    for key in ("vocab_size", "hidden_size", "head_dim", "sliding_window", "layer_types", "rms_norm_eps"):
        assert config[key] == getattr(expected, key), key
    assert config["rope_theta"] == 1e6
    assert config["rope_local_base_freq"] == 1e4
    assert config["hidden_activation"] == "gelu_pytorch_tanh"


def test_old_files_with_an_expert_a_tensor_are_read(write_gguf, tiny_directory, tmp_path):
    def unstacked(pairs):
        for name, array in pairs:
            if not name.endswith("_exps.weight"):
                yield name, array
                continue
            stem = name.removesuffix("_exps.weight")
            yield from ((f"{stem}.{expert}.weight", matrix) for expert, matrix in enumerate(array))

    checkpoint = open_model(write_gguf(tmp_path / "m.gguf", "mixtral", tensors=unstacked))
    for name, array in _expected(tiny_directory, "mixtral").items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), array, err_msg=name)


# Rotary scaling


def _llama3_factors(head_size, theta, factor, original, low=1.0, high=4.0):
    """The loop of convert_hf_to_gguf.py."""
    factors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_size, 2) / head_size):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 4096)])
def test_llama3_scaling_is_found_from_its_factors(write_gguf, tmp_path, factor, original):
    def widen(writer):
        del writer.kv_data[0]["llama.rope.freq_base"]
        writer.add_rope_freq_base(500000.0)

    factors = ("rope_freqs.weight", _llama3_factors(64, 500000.0, factor, original))
    path = write_gguf(tmp_path / "m.gguf", "llama", change=widen, tensors=lambda pairs: [*pairs, factors])
    checkpoint = open_model(path)
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    assert not any("rope_freqs" in name for name in checkpoint.tensors)
    assert any("rope_freqs.weight" in note for note in checkpoint.notes)


def test_factors_of_no_known_rule_are_refused(write_gguf, tmp_path):
    factors = np.array([1, 2, 7, 3], dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors=lambda pairs: [*pairs, ("rope_freqs.weight", factors)])
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        open_model(path)


def test_linear_scaling_is_read(write_gguf, tmp_path):
    def scale(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    config = open_model(write_gguf(tmp_path / "m.gguf", "qwen2", change=scale)).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


def test_longrope_factors_of_phi3_are_read(write_gguf, tmp_path):
    short, long = np.linspace(1, 2, 4, dtype=np.float32), np.linspace(1, 9, 4, dtype=np.float32)
    path = write_gguf(
        tmp_path / "m.gguf", "phi3", change=lambda writer: writer.add_rope_scaling_orig_ctx_len(32),
        tensors=lambda pairs: [*pairs, ("rope_factors_short.weight", short), ("rope_factors_long.weight", long)],
    )  # fmt: skip
    config = open_model(path).config
    assert config["rope_scaling"]["rope_type"] == "longrope"
    np.testing.assert_allclose(config["rope_scaling"]["long_factor"], long, rtol=1e-6)
    assert config["original_max_position_embeddings"] == 32


# What is wrong with the file


def test_an_architecture_that_is_not_read_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf is a GGUF file of architecture 'mamba'") as caught:
        open_model(tmp_path / "m.gguf")
    assert "llama" in caught.value.hint


def test_an_unknown_tensor_is_named(write_gguf, tmp_path):
    extra = ("blk.0.attn_sinks.weight", np.zeros(4, dtype=np.float32))
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors=lambda pairs: [*pairs, extra])
    with pytest.raises(UnsupportedModelError, match=r"blk\.0\.attn_sinks\.weight"):
        open_model(path)


def test_a_missing_metadata_key_is_named(write_gguf, tmp_path):
    def drop(writer):
        del writer.kv_data[0]["llama.embedding_length"]

    with pytest.raises(BadInputError, match=r"llama\.embedding_length"):
        open_model(write_gguf(tmp_path / "m.gguf", "llama", change=drop))


@pytest.mark.parametrize("value", ["many", -3.5, True])
def test_a_metadata_value_of_another_kind_is_named(write_gguf, tmp_path, value):
    def replace(writer):
        del writer.kv_data[0]["llama.block_count"]
        writer.add_key_value("llama.block_count", value, gguf.GGUFValueType.get_type(value))

    with pytest.raises(BadInputError, match=r"llama\.block_count.*expected a count"):
        open_model(write_gguf(tmp_path / "m.gguf", "llama", change=replace))


def test_a_head_count_that_differs_by_layer_is_refused(write_gguf, tmp_path):
    def replace(writer):
        del writer.kv_data[0]["llama.attention.head_count_kv"]
        writer.add_array("llama.attention.head_count_kv", [2, 4])

    with pytest.raises(UnsupportedModelError, match="head_count_kv"):
        open_model(write_gguf(tmp_path / "m.gguf", "llama", change=replace))


def test_heads_that_do_not_divide_the_rows_are_named(write_gguf, tmp_path):
    def replace(writer):
        del writer.kv_data[0]["llama.attention.head_count"]
        writer.add_head_count(5)

    with pytest.raises(BadInputError, match=r"attn_q\.weight.*5 heads"):
        open_model(write_gguf(tmp_path / "m.gguf", "llama", change=replace))


def test_a_missing_embedding_is_named(write_gguf, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors=lambda pairs: [p for p in pairs if p[0][:5] != "token"])
    with pytest.raises(BadInputError, match=r"token_embd\.weight"):
        open_model(path)


# Split models


@pytest.fixture
def split(write_gguf, tiny_directory, tmp_path):
    """The same model in three files, as llama-gguf-split writes it."""
    paths = [tmp_path / f"tiny-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):

        def mark(writer, number=number):
            writer.add_uint16("split.count", 3)
            writer.add_uint16("split.no", number)
            if number:
                for key in [key for key in writer.kv_data[0] if key.startswith("llama.")]:
                    del writer.kv_data[0][key]

        write_gguf(path, "llama", change=mark, tensors=lambda pairs, number=number: pairs[number::3])
    return paths


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_split_model_opens_by_any_of_its_files(split, tiny_directory, which):
    checkpoint = open_model(split[which])
    for name, array in _expected(tiny_directory, "llama").items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), array)


def test_a_missing_split_is_named(split):
    split[2].unlink()
    with pytest.raises(BadInputError, match=r"tiny-00003-of-00003\.gguf"):
        open_model(split[0])


def test_a_renamed_split_is_refused(split, tmp_path):
    split[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(BadInputError, match="one of 3 files"):
        open_model(tmp_path / "renamed.gguf")


@pytest.mark.parametrize(
    ("pooling", "mode"), [(1, "pooling_mode_mean_tokens"), (2, "pooling_mode_cls_token"), (0, None), (None, None)]
)
def test_the_pooling_of_an_embedding_model_is_read(write_gguf, tmp_path, pooling, mode):
    def change(writer):
        if pooling is not None:
            writer.add_pooling_type(gguf.PoolingType(pooling))

    assets = open_model(write_gguf(tmp_path / "m.gguf", "bert", change=change)).assets
    assert ("modules.json" in assets) is (mode is not None)
    if mode:
        config = json.loads(assets["1_Pooling/config.json"])
        assert [key for key, value in config.items() if value is True] == [mode]
