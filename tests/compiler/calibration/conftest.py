"""A tiny Llama from a seed, whose layers are of whole blocks, and a text for it."""

from pathlib import Path

import pytest

from trtllm.frontends.detect import open_model

TEXT = "".join(
    f"The {n}th of {n * n % 97} small words went to {n * 7 % 31} and came back as {n ^ 21}.\n" for n in range(300)
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, hidden 64, bytes as tokens; embeddings of rank 24, so that inputs of layers depend on each other."""
    torch = pytest.importorskip("torch", reason="the model is made by torch")
    transformers = pytest.importorskip("transformers", reason="the model is made by transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    table = model.model.embed_tokens.weight
    table.data = torch.randn(256, 24) @ torch.randn(24, 64) / 5
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def checkpoint(tiny_model: Path):
    return open_model(str(tiny_model), notify=lambda text: None)
