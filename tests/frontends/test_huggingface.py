"""Hugging Face directories: every family under its canonical names, and what is wrong with a broken one."""

import json
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trtllm.dtypes import DType
from trtllm.errors import BadInputError, TargetError, TrtllmError, UnsupportedModelError
from trtllm.frontends.detect import open_model

FAMILIES = [
    "llama", "llama_untied", "llama_base", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma2", "gemma3", "phi3", "gpt2",
    "gpt2_base", "bert", "bert_masked", "gemma3_wrapped",
]  # fmt: skip


@pytest.fixture
def llama(tiny_directory, tmp_path):
    """A saved llama of one's own, to break."""
    return shutil.copytree(tiny_directory("llama"), tmp_path / "llama")


@pytest.fixture
def sharded(tiny_model, tmp_path):
    directory = tmp_path / "sharded"
    tiny_model("llama").save_pretrained(directory, max_shard_size="30KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def _edit(path, **changes):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))


def _refused(error, directory, *words):
    with pytest.raises(error) as caught:
        open_model(directory)
    for word in words:
        assert word in caught.value.what, caught.value.what
    assert caught.value.hint
    assert "\n" not in caught.value.what + caught.value.hint
    return caught.value


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_with_all_its_tensors(tiny_directory, family):
    directory = tiny_directory(family)
    checkpoint = open_model(directory)
    stored = load_file(directory / "model.safetensors")
    is_text = [name for name in stored if not name.startswith(("vision_tower", "multi_modal"))]
    assert len(checkpoint.tensors) == len(is_text)
    assert checkpoint.format == "huggingface"
    for name, tensor in checkpoint.tensors.items():
        assert tensor.spec.name == name
        assert tensor.read().shape == tensor.spec.shape


@pytest.mark.parametrize(
    ("family", "name", "stored"),
    [
        ("llama_base", "model.layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight"),
        ("llama_base", "model.embed_tokens.weight", "embed_tokens.weight"),
        ("gpt2_base", "transformer.h.0.attn.c_attn.weight", "h.0.attn.c_attn.weight"),
        ("gpt2", "transformer.wte.weight", "transformer.wte.weight"),
        ("bert_masked", "encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.output.dense.weight"),
        ("bert", "embeddings.LayerNorm.bias", "embeddings.LayerNorm.bias"),
        ("gemma3_wrapped", "model.layers.0.self_attn.q_norm.weight",
         "language_model.model.layers.0.self_attn.q_norm.weight"),
    ],
)  # fmt: skip
def test_names_are_those_of_the_published_model(tiny_directory, family, name, stored):
    directory = tiny_directory(family)
    expected = load_file(directory / "model.safetensors")[stored].numpy()
    np.testing.assert_array_equal(open_model(directory).tensors[name].read(), expected)


def test_a_tied_head_stays_absent(tiny_directory):
    assert "lm_head.weight" not in open_model(tiny_directory("llama")).tensors
    assert "lm_head.weight" in open_model(tiny_directory("llama_untied")).tensors


def test_a_wrapper_is_read_as_its_text_model(tiny_directory):
    checkpoint = open_model(tiny_directory("gemma3_wrapped"))
    assert checkpoint.architecture == "Gemma3ForCausalLM"
    assert checkpoint.config["architectures"] == ["Gemma3ForCausalLM"]
    assert checkpoint.config["model_type"] == "gemma3_text"
    assert checkpoint.config["hidden_size"] == 32
    assert checkpoint.config["dtype"] == "float32"
    assert "vision_config" not in checkpoint.config
    notes = "\n".join(checkpoint.notes)
    assert "Gemma3ForConditionalGeneration" in notes
    assert "vision_tower" in notes


def test_a_published_gemma3_wrapper_gets_the_defaults_it_leaves_out(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("gemma3_wrapped"), tmp_path / "gemma")
    _edit(
        directory / "config.json",
        text_config={
            "model_type": "gemma3_text", "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        eos_token_id=[1, 106], torch_dtype="bfloat16",
    )  # fmt: skip
    config = open_model(directory).config
    assert config["num_attention_heads"] == 8
    assert config["head_dim"] == 256
    assert config["sliding_window"] == 1024
    assert config["rope_local_base_freq"] == 1e4
    assert config["eos_token_id"] == [1, 106]
    assert config["torch_dtype"] == "bfloat16"


def test_a_wrapper_around_an_unknown_text_model_is_refused(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("gemma3_wrapped"), tmp_path / "gemma")
    _edit(directory / "config.json", text_config={"model_type": "mamba"})
    _refused(UnsupportedModelError, directory, "mamba")


@pytest.mark.parametrize(("family", "block"), [("mixtral", "mlp"), ("qwen3_moe", "mlp")])
def test_fused_experts_in_a_directory_are_split(tiny_model, tiny_directory, tmp_path, family, block):
    directory = shutil.copytree(tiny_directory(family), tmp_path / "fused")
    fused = {name: tensor.contiguous() for name, tensor in tiny_model(family).state_dict().items()}
    assert any(name.endswith(f"{block}.experts.gate_up_proj") for name in fused)
    save_file(fused, directory / "model.safetensors")
    split, expected = open_model(directory), open_model(tiny_directory(family))
    assert split.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(split.tensors[name].read(), tensor.read(), err_msg=name)
        np.testing.assert_array_equal(split.tensors[name].read(1, 3), tensor.read(1, 3), err_msg=name)


def test_shards_hold_what_one_file_holds(sharded, tiny_directory):
    checkpoint, whole = open_model(sharded), open_model(tiny_directory("llama"))
    assert checkpoint.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), tensor.read())


def test_the_first_note_says_what_was_found(sharded):
    found = []
    open_model(sharded, notify=found.append)
    files = len(list(sharded.glob("*.safetensors")))
    assert found[0] == f"Hugging Face directory, LlamaForCausalLM, {files} safetensors files, 20 tensors, float32"


def test_buffers_are_ignored_by_name(llama):
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, llama / "model.safetensors")
    checkpoint = open_model(llama)
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in checkpoint.tensors
    assert any("model.layers.0.self_attn.rotary_emb.inv_freq" in note for note in checkpoint.notes)


def test_masks_of_old_gpt2_files_are_ignored_but_biases_are_not(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("gpt2_base"), tmp_path / "gpt2")
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"h.0.attn.bias": torch.ones(4), "h.0.attn.masked_bias": torch.ones(1)},
              directory / "model.safetensors")  # fmt: skip
    names = open_model(directory).tensors.keys()
    assert "transformer.h.0.attn.bias" not in names
    assert "transformer.h.0.attn.c_attn.bias" in names
    assert len(names) == len(tensors)


def test_bfloat16_stays_bfloat16(tiny_model, tmp_path):
    model = tiny_model("llama_untied")
    torch.save({}, tmp_path / "ignored.pt")
    save_file({n: t.bfloat16().contiguous() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    _edit(tmp_path / "config.json", architectures=["LlamaForCausalLM"])
    checkpoint = open_model(tmp_path)
    assert {tensor.spec.dtype for tensor in checkpoint.tensors.values()} == {DType.BFLOAT16}


def test_one_safetensors_file_beside_a_config_opens(llama):
    (llama / "model.safetensors").rename(llama / "anything.safetensors")
    assert len(open_model(llama / "anything.safetensors").tensors) == 20
    assert len(open_model(llama).tensors) == 20
    (llama / "config.json").unlink()
    _refused(BadInputError, llama / "anything.safetensors", "config.json", "anything.safetensors")


def test_the_text_of_rope_parameters_stays_as_it_is(llama):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    _edit(llama / "config.json", rope_parameters=rope)
    assert open_model(llama).config["rope_parameters"] == rope


# What is wrong with the files


def test_damaged_config_is_named_with_line_and_column(llama):
    (llama / "config.json").write_text('{"a": 1,\n "b": }')
    _refused(BadInputError, llama, "config.json", "line 2 column 7")


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe{}", b"", b"3"])
def test_a_config_that_is_no_json_object_is_refused(llama, content):
    (llama / "config.json").write_bytes(content)
    _refused(BadInputError, llama, "config.json")


def test_a_git_lfs_pointer_is_recognised(llama):
    (llama / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in _refused(BadInputError, llama, "config.json").hint


@pytest.mark.parametrize("value", [..., None, [], "LlamaForCausalLM", [None], {}])
def test_a_config_without_architecture_is_refused(llama, value):
    _edit(llama / "config.json", architectures=value)
    _refused(BadInputError, llama, "architectures", str(llama))


@pytest.mark.parametrize("method", ["awq", "fp8", "compressed-tensors", "bitsandbytes"])
def test_a_quantization_that_no_tensor_has_is_refused(llama, method):
    _edit(llama / "config.json", quantization_config={"quant_method": method})
    _refused(BadInputError, llama, f"quantization method '{method}'", "no tensor is stored so")


@pytest.mark.parametrize("method", ["aqlm", "hqq", "something-new"])
def test_quantizations_that_are_not_read_are_refused_by_name(llama, method):
    _edit(llama / "config.json", quantization_config={"quant_method": method})
    _refused(UnsupportedModelError, llama, f"quantization method '{method}' is not read")


@pytest.mark.parametrize("quantization", [{"bits": 4}, "awq", {"quant_method": 4}])
def test_a_quantization_without_method_is_refused(llama, quantization):
    _edit(llama / "config.json", quantization_config=quantization)
    _refused(BadInputError, llama, "quantization_config without quant_method")


def test_an_algorithm_of_modelopt_that_is_not_read_is_refused_by_name(llama):
    (llama / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "W4A8_AWQ"}}')
    _refused(UnsupportedModelError, llama, "quantization method 'modelopt'", "quant_algo W4A8_AWQ")


def test_two_quantizations_contradict_each_other(llama):
    _edit(llama / "config.json", quantization_config={"quant_method": "awq"})
    (llama / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    _refused(BadInputError, llama, "'awq'", "modelopt")


@pytest.mark.parametrize("content", ["{}", '{"quantization": []}'])
def test_a_damaged_config_of_modelopt_is_refused(llama, content):
    (llama / "hf_quant_config.json").write_text(content)
    _refused(BadInputError, llama, "hf_quant_config.json has no 'quantization'")


def test_a_missing_shard_is_named(sharded):
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    _refused(BadInputError, sharded, lost.name, "model.safetensors.index.json")


def test_a_cut_shard_is_named(sharded):
    cut = sorted(sharded.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-10])
    _refused(BadInputError, sharded, cut.name, "cut short")


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..\\x.safetensors", 3, "x.py", ""]
)
def test_an_index_that_leaves_its_directory_is_refused(sharded, shard):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    _edit(index, weight_map=weight_map | {"model.norm.weight": shard})
    _refused(BadInputError, sharded, "model.norm.weight", "index.json")


def test_a_shard_that_is_a_link_into_a_cache_is_read(sharded, tmp_path):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    blob = tmp_path / "blob"
    shard.rename(blob)
    shard.symlink_to(blob)
    assert len(open_model(sharded).tensors) == 20


def test_a_tensor_that_the_index_promises_in_vain_is_named(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(weight_map.items()))
    _edit(index, weight_map=weight_map | {"model.extra.weight": shard})
    _refused(BadInputError, sharded, "model.extra.weight", shard)
    other = next(value for value in weight_map.values() if value != shard)
    _edit(index, weight_map=weight_map | {name: other})
    _refused(BadInputError, sharded, name, other)


def test_a_tensor_that_the_index_leaves_out_is_read_and_noted(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    _edit(index, weight_map=weight_map)
    checkpoint = open_model(sharded)
    assert "model.norm.weight" in checkpoint.tensors
    assert any("model.norm.weight" in note for note in checkpoint.notes)


def test_a_tensor_in_two_shards_is_named(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second)
    _refused(BadInputError, sharded, name, first.name, second.name)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_weights_is_refused(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(BadInputError, sharded, "index.json", "weight_map")


def test_two_names_that_become_one_are_refused(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("bert"), tmp_path / "bert")
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"bert.pooler.dense.bias": torch.zeros(32)}, directory / "model.safetensors")
    _refused(BadInputError, directory, "pooler.dense.bias")


def test_a_directory_without_weights_is_refused(llama):
    (llama / "model.safetensors").unlink()
    _refused(BadInputError, llama, "no weights")


# PyTorch files


@pytest.fixture
def pytorch(llama):
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    return llama


def test_pytorch_weights_are_those_of_safetensors(pytorch, tiny_directory):
    checkpoint, expected = open_model(pytorch), open_model(tiny_directory("llama"))
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].read(), tensor.read())
        np.testing.assert_array_equal(checkpoint.tensors[name].read(1, 3), tensor.read(1, 3))
    assert "PyTorch" in checkpoint.notes[0]


def test_bfloat16_pytorch_weights_keep_their_bits(pytorch):
    state = torch.load(pytorch / "pytorch_model.bin")
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, pytorch / "pytorch_model.bin")
    tensor = open_model(pytorch).tensors["model.norm.weight"]
    assert tensor.spec.dtype is DType.BFLOAT16
    expected = state["model.norm.weight"].bfloat16().float().numpy()
    np.testing.assert_array_equal(tensor.read().astype(np.float32), expected)


class _Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_with_code_is_refused_and_not_run(pytorch, capsys):
    torch.save({"w": _Payload()}, pytorch / "pytorch_model.bin")
    _refused(BadInputError, pytorch, "pytorch_model.bin", "run code")
    (pytorch / "pytorch_model.bin").write_bytes(pickle.dumps({"w": _Payload()}))
    _refused(BadInputError, pytorch, "pytorch_model.bin")
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 1, 100, 5000])
def test_a_cut_pytorch_file_is_refused(pytorch, keep):
    file = pytorch / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:keep])
    _refused(TrtllmError, pytorch, "pytorch_model.bin")


def test_a_pytorch_file_of_something_else_is_refused(pytorch):
    torch.save([torch.zeros(2)], pytorch / "pytorch_model.bin")
    _refused(BadInputError, pytorch, "pytorch_model.bin", "list")
    torch.save({"epoch": 3, "w": torch.zeros(2)}, pytorch / "pytorch_model.bin")
    _refused(BadInputError, pytorch, "pytorch_model.bin", "epoch")


def test_without_torch_the_extra_is_named(pytorch, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "[torch]" in _refused(TargetError, pytorch, "pytorch_model.bin", "torch").hint
