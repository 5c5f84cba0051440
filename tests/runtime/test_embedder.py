"""The embedder: order and padding do not matter, long texts keep their special tokens, wrong input is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm import LLM, Embedder, TrtllmError, compile
from trtllm.errors import UsageError

HIDDEN, LIMIT = 32, 12
CLASS, SEPARATOR = 256, 257
TEXTS = ("a", "hello world", "", "abc", "no", "seven 77", "x y z", "ü€", "0123456789", "bb")


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer that puts a text between <cls> and <sep>."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens([AddedToken("<cls>", special=True), AddedToken("<sep>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", special_tokens=[("<cls>", CLASS), ("<sep>", SEPARATOR)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"cls_token": "<cls>", "sep_token": "<sep>"}))


@pytest.fixture(scope="module")
def bert_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch", reason="the model is made with torch")
    transformers = pytest.importorskip("transformers", reason="the model is made with transformers")
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=260,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=20,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    transformers.BertModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def engine(bert_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "tiny-bert"
    compile(bert_directory, output_dir=folder, max_batch_size=3, max_seq_len=LIMIT)
    return folder


@pytest.fixture
def embedder(engine: Path) -> Any:
    with Embedder(engine, threads=1) as loaded:
        yield loaded


def close(expected: np.ndarray) -> float:
    """Two orders of summation in float32: eps * sqrt(terms) a product, seven a layer, of the largest value."""
    return float(np.finfo(np.float32).eps * np.sqrt(HIDDEN) * 14 * np.abs(expected).max())


def test_a_list_gives_one_row_a_text_and_a_string_one_row(embedder: Embedder) -> None:
    rows = embedder.embed(list(TEXTS))
    assert rows.shape == (len(TEXTS), HIDDEN) and rows.dtype == np.float32
    assert embedder.embed("hello").shape == (1, HIDDEN)
    assert embedder.embed([]).shape == (0, HIDDEN)


def test_neither_order_nor_company_changes_a_vector(embedder: Embedder) -> None:
    together = embedder.embed(list(TEXTS))
    backwards = embedder.embed(list(reversed(TEXTS)))[::-1]
    alone = np.concatenate([embedder.embed(text) for text in TEXTS])
    assert np.abs(backwards - together).max() <= close(together)
    assert np.abs(alone - together).max() <= close(together)


def test_batches_hold_texts_of_similar_length_within_the_limits(embedder: Embedder, monkeypatch: Any) -> None:
    seen = []
    encode = embedder._session.encode
    monkeypatch.setattr(
        embedder._session, "encode", lambda tokens, lengths: seen.append(tokens.shape) or encode(tokens, lengths)
    )
    embedder.embed(list(TEXTS))
    assert sum(rows for rows, _ in seen) == len(TEXTS)
    assert max(rows for rows, _ in seen) == 3
    assert [width for _, width in seen] == sorted((width for _, width in seen), reverse=True)
    embedder._max_batch_tokens = 2 * LIMIT
    seen.clear()
    embedder.embed(["z" * LIMIT] * 5)
    assert seen == [(2, LIMIT), (2, LIMIT), (1, LIMIT)]


def test_a_long_text_loses_its_end_and_keeps_its_special_tokens(embedder: Embedder) -> None:
    content = embedder.tokenizer.encode("0123456789abcdef", add_special_tokens=False)
    cut = [CLASS, *content[: LIMIT - 2], SEPARATOR]
    assert embedder._tokens("0123456789abcdef") == cut
    np.testing.assert_array_equal(embedder.embed("0123456789abcdef"), embedder.embed_tokens([cut]))


@pytest.mark.parametrize(
    ("sequence", "named"), [([], "0 tokens"), ([1] * (LIMIT + 1), "13 tokens"), ([1, 260], "260"), ([-1], "-1")]
)
def test_token_ids_that_the_engine_cannot_take_are_refused(embedder: Embedder, sequence: list[int], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        embedder.embed_tokens([[1, 2], sequence])


def test_an_embedder_that_was_shut_down_says_so(engine: Path) -> None:
    with Embedder(engine) as embedder:
        pass
    with pytest.raises(UsageError, match="shut down"):
        embedder.embed("a")


def test_engines_that_do_not_embed_are_refused(bert_directory: Path, tiny_llama_engine: Path, tmp_path: Path) -> None:
    from trtllm import BuildConfig

    with pytest.raises(TrtllmError, match="decoder"):
        Embedder(tiny_llama_engine)
    states = compile(bert_directory, output_dir=tmp_path / "states", config=BuildConfig(pooling="none"))
    with pytest.raises(TrtllmError, match="pooling 'none'"):
        Embedder(states)


def test_an_engine_takes_the_length_it_was_published_for(bert_directory: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "published"
    shutil.copytree(bert_directory, folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    compile(folder, output_dir=tmp_path / "engine")
    with Embedder(tmp_path / "engine") as embedder:
        assert embedder.max_tokens == 9
    compile(folder, output_dir=tmp_path / "longer", max_seq_len=20)
    with Embedder(tmp_path / "longer") as embedder:
        assert embedder.max_tokens == 20


def test_an_llm_on_an_encoder_embeds_and_does_nothing_else(engine: Path, embedder: Embedder) -> None:
    with LLM(engine, threads=1) as llm:
        assert np.array_equal(llm.embed(["hello", "world"]), embedder.embed(["hello", "world"]))
        ids = llm.tokenize("hello")
        assert np.array_equal(llm.embed([ids]), embedder.embed_tokens([ids]))
        for call in (llm.generate, llm.generate_async, llm.stream):
            with pytest.raises(UsageError, match="encoder"):
                call("hello")
