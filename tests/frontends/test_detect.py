"""What a path holds is found by looking; what is not read is refused by name."""

import io
import json
import shutil
import tarfile

import pytest

from trtllm.errors import BadInputError, TrtllmError, UnsupportedModelError, UsageError
from trtllm.frontends.detect import open_model


def _refused(error, path, *words):
    with pytest.raises(error) as caught:
        open_model(path)
    assert isinstance(caught.value, TrtllmError)
    for word in (str(path), *words):
        assert word in caught.value.what, caught.value.what
    assert caught.value.hint
    assert "\n" not in caught.value.what + caught.value.hint


def _touch(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_bytes(b"x")
    return directory


def test_a_path_that_does_not_exist_is_said_so(tmp_path):
    _refused(BadInputError, tmp_path / "nothing", "no model")
    _refused(BadInputError, "./nowhere/at/all", "no model")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["config.json", "rank0.engine"], "TensorRT-LLM engine"),
        (["context/model.yaml", "weights/metadata.json"], "NeMo"),
        (["model_config.yaml", "model_weights.ckpt"], "NeMo"),
        (["model.nemo"], "NeMo"),
        ([".metadata", "__0_0.distcp"], "torch_dist"),
        (["_METADATA", "manifest.ocdbt"], "JAX"),
        (["_CHECKPOINT_METADATA", "default/x"], "JAX"),
        (["config.json", "flax_model.msgpack"], "JAX"),
        (["config.json", "tf_model.h5"], "Keras"),
        (["adapter_config.json", "adapter_model.safetensors"], "LoRA"),
        (["model.onnx", "config.json"], "ONNX"),
    ],
)
def test_known_directories_that_are_not_read_are_named(tmp_path, names, kind):
    _refused(UnsupportedModelError, _touch(tmp_path, *names), kind)


def test_an_engine_directory_is_no_model(tmp_path):
    _refused(UsageError, _touch(tmp_path, "manifest.json", "config.json", "rank0.engine"), "engine directory")


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("x.nemo", b"\x1f\x8b" + b"\0" * 600, "NeMo"),
        ("flax_model.msgpack", b"\x80", "flax"),
        ("weights.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "HDF5"),
        ("model.onnx", b"\x08\x07", "ONNX"),
        ("rank0.engine", b"ftrt", "engine"),
    ],
)
def test_known_files_that_are_not_read_are_named(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    _refused(UnsupportedModelError, tmp_path / name, kind)


@pytest.mark.parametrize(("name", "kind"), [("x.nemo", "NeMo"), ("weights.tar", "tar")])
def test_an_archive_is_known_by_its_content(tmp_path, name, kind):
    with tarfile.open(tmp_path / name, "w") as archive:
        archive.addfile(tarfile.TarInfo("model_config.yaml"), io.BytesIO())
    _refused(UnsupportedModelError, tmp_path / name, kind)


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty", b""), ("text.txt", b"hello"), ("zeros", b"\0" * 1000), ("model.gguf", b"GGML....")],
)
def test_files_of_no_format_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    _refused(BadInputError, tmp_path / name)


def test_an_empty_directory_is_refused(tmp_path):
    _refused(BadInputError, tmp_path, "config.json")


def test_a_directory_of_several_gguf_files_asks_for_one(tmp_path):
    _refused(UsageError, _touch(tmp_path, "a.gguf", "b.gguf"), "a.gguf, b.gguf")


def test_content_counts_not_the_name(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("llama"), tmp_path / "x.nemo")
    (directory / "model.safetensors").rename(directory / "weights.dat")
    assert len(open_model(directory / "weights.dat").tensors) == 20


def test_config_json_stands_for_its_directory(tiny_directory):
    assert open_model(tiny_directory("llama") / "config.json").architecture == "LlamaForCausalLM"


def test_a_path_may_be_text_with_a_tilde(tiny_directory, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_directory("llama").parent))
    assert open_model(f"~/{tiny_directory('llama').name}").architecture == "LlamaForCausalLM"


def test_notes_reach_the_listener(tiny_directory):
    heard = []
    checkpoint = open_model(tiny_directory("qwen2"), notify=heard.append)
    assert tuple(heard) == checkpoint.notes


def test_a_pooling_model_brings_its_pooling(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("bert"), tmp_path / "bert")
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (directory / "modules.json").write_text("[]")
    assert {"1_Pooling/config.json", "modules.json"} <= open_model(directory).assets.keys()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_tokenizer_files_are_named(tiny_directory, tmp_path, name):
    directory = shutil.copytree(tiny_directory("llama"), tmp_path / "llama")
    (directory / name).write_text('{"a": ')
    with pytest.raises(BadInputError, match=name):
        open_model(directory)


def test_a_sentencepiece_vocabulary_that_cannot_be_converted_is_noted(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("llama"), tmp_path / "llama")
    (directory / "tokenizer.model").write_bytes(b"not sentencepiece")
    checkpoint = open_model(directory)
    assert "tokenizer.json" not in checkpoint.assets
    assert any("tokenizer.model" in note for note in checkpoint.notes)


def test_a_vocabulary_of_the_old_kind_is_converted(tiny_directory, tmp_path):
    directory = shutil.copytree(tiny_directory("bert"), tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "wor", "##ld"]
    (directory / "vocab.txt").write_text("\n".join(words))
    checkpoint = open_model(directory)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())
    assert tokenizer.encode("Hello world").ids == [2, 5, 6, 7, 3]
    assert any("vocab.txt" in note for note in checkpoint.notes)


def test_a_sentencepiece_vocabulary_is_converted(tiny_directory, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    directory = shutil.copytree(tiny_directory("llama"), tmp_path / "llama")
    text = tmp_path / "corpus.txt"
    text.write_text("the fox and the hound ran over the hill\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "tokenizer"), vocab_size=300, model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    checkpoint = open_model(directory)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())
    expected = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model")).encode("the fox über")
    assert tokenizer.encode("the fox über", add_special_tokens=False).ids == expected
    assert "tokenizer.json was made from tokenizer.model" in checkpoint.notes
