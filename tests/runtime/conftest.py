"""A tiny random Llama with a byte-level tokenizer, as a Hugging Face directory and as an engine."""

import json
from pathlib import Path

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
