"""A tiny random Llama with a byte-level tokenizer, as a Hugging Face directory and as an engine."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

VOCABULARY = 300
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_llama_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, hidden 64, vocabulary 300 (256 bytes, specials, spare)."""
    torch = pytest.importorskip("torch", reason="the reference model needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference model needs transformers")
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=256,
        eos_token_id=257,
        initializer_range=0.4,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama_engine(tiny_llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model built for onnxruntime in float32: three slots of 96 tokens."""
    from trtllm import compile

    folder = tmp_path_factory.mktemp("engines") / "tiny-llama"
    compile(tiny_llama_directory, output_dir=folder, max_batch_size=3, max_seq_len=96)
    return folder


def _fake(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def fake_cuda() -> ModuleType:
    """fake_cuda.py."""
    return _fake("fake_cuda")


@pytest.fixture(scope="session")
def fake_tensorrt() -> ModuleType:
    """fake_tensorrt.py."""
    return _fake("fake_tensorrt")


@pytest.fixture(scope="session")
def padded_engines(tiny_llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """The tiny model in the padded form, six slots of 96 tokens; by whether they give all logits."""
    from trtllm import BuildConfig, compile

    made = {}
    for gathers_all in (False, True):
        folder = tmp_path_factory.mktemp("engines") / "linear"
        config = BuildConfig(max_batch_size=6, max_seq_len=96, optimization_level=1, gather_context_logits=gathers_all)
        made[gathers_all] = compile(tiny_llama_directory, output_dir=folder, config=config)
    return made


@pytest.fixture(scope="session")
def gathered_engines(
    padded_engines: dict[bool, Any], fake_tensorrt: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[bool, Any]:
    """Fake plans of the same model over 40 blocks of 8 tokens, by whether they give all logits."""
    shape, folder = fake_tensorrt.Shape, tmp_path_factory.mktemp("plans")
    shapes = [shape(rows, 1, columns) for rows in (1, 2, 4) for columns in (4, 12)]
    shapes += [shape(1, tokens, 12) for tokens in (4, 16)]
    return {
        gathers_all: fake_tensorrt.write_engine(
            folder / str(gathers_all), model, shapes, num_blocks=41, tokens_per_block=8, gathers_all=gathers_all
        )
        for gathers_all, model in padded_engines.items()
    }


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, fake_cuda: Any, fake_tensorrt: Any) -> Any:
    """The GPU that sessions of this test open, and the library that plans are loaded with."""
    fake = fake_cuda.FakeDevice()
    monkeypatch.setattr("trtllm.runtime.sessions.tensorrt_session.open_device", lambda: fake)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module(fake))
    return fake


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
