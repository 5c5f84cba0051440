"""Text in pieces is the text of all tokens, for every kind of tokenizer and whatever the tokens are."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from trtllm.runtime.detokenizer import ByteLevelStream, CleanUpStream, IncrementalDetokenizer
from trtllm.runtime.tokenizer import Tokenizer, clean_up

TEXTS = [
    "the fox 's den , is n't it ? ' ' no .",
    "über 日本語 🇪🇸 naïve",
    "don ' t stop ! we 've won",
    "a  b   c \n\n d",
]
SPECIAL = [AddedToken("<s>", special=True), AddedToken("</s>", special=True), AddedToken("<extra>", special=False)]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    return backend


def byte_fallback() -> Backend:
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁the", "the", "s", "▁s", "é", "日", ""]
    backend = Backend(
        models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


def word_piece(*, cleans: bool = False) -> Backend:
    words = [
        "[UNK]",
        "the",
        "do",
        "n",
        "##n",
        "'",
        "##'",
        "t",
        "##t",
        ".",
        "##.",
        "!",
        ",",
        "?",
        "s",
        "m",
        "ve",
        "re",
        "é",
    ]
    backend = Backend(models.WordPiece(vocab={word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=cleans)
    return backend


def unigram() -> Backend:
    pieces = ["<unk>", "▁", "▁the", "fox", "▁▁", "é", "日本", "'", "s", ".", "▁."]
    backend = Backend(models.Unigram([(piece, -float(place)) for place, piece in enumerate(pieces)], unk_id=0))
    backend.decoder = decoders.Metaspace()
    return backend


def suffixed() -> Backend:
    words = ["<unk>", "a</w>", "b", "</w>", "é</w>", "c"]
    backend = Backend(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return backend


def undecoded() -> Backend:
    return Backend(models.WordLevel(vocab={"a": 0, "b": 1, "日": 2}, unk_token="a"))


KINDS: dict[str, tuple[Callable[[], Backend], bool]] = {
    "byte level": (byte_level, False),
    "byte fallback": (byte_fallback, False),
    "wordpiece": (word_piece, False),
    "wordpiece cleaned by the decoder": (lambda: word_piece(cleans=True), False),
    "wordpiece cleaned up": (word_piece, True),
    "unigram": (unigram, False),
    "suffixed": (suffixed, False),
    "undecoded": (undecoded, False),
}


def make(folder: Path, backend: Backend, *, cleans_up: bool) -> Tokenizer:
    backend.add_tokens(SPECIAL)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": cleans_up}))
    return Tokenizer.from_directory(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        kind: make(tmp_path_factory.mktemp("tokenizer"), build(), cleans_up=cleans_up)
        for kind, (build, cleans_up) in KINDS.items()
    }


def in_pieces(tokenizer: Tokenizer, ids: list[int], **options: bool) -> str:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return "".join([*(detokenizer.push(token) for token in ids), detokenizer.flush()])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(0, 60), skips=st.booleans(), spaced=st.booleans())
def test_the_pieces_put_together_are_the_decoded_text(
    tokenizers: dict[str, Tokenizer], kind: str, seed: int, length: int, skips: bool, spaced: bool
) -> None:
    tokenizer = tokenizers[kind]
    chosen = random.Random(seed)
    ids = [chosen.randrange(tokenizer.vocab_size + 2) for _ in range(length)]
    options = {"skip_special_tokens": skips, "spaces_between_special_tokens": spaced}
    assert in_pieces(tokenizer, ids, **options) == tokenizer.decode(ids, **options)


def test_the_pieces_of_the_real_tokenizer_are_the_decoded_text(smollm2_gguf: Path, tmp_path: Path) -> None:
    tokenizer = real_tokenizer(smollm2_gguf, tmp_path)
    chosen = random.Random(5)
    for _ in range(200):
        ids = [chosen.randrange(tokenizer.vocab_size) for _ in range(50)]
        assert in_pieces(tokenizer, ids) == tokenizer.decode(ids)
    for text in TEXTS:
        assert in_pieces(tokenizer, tokenizer.encode(text)) == text


def real_tokenizer(model: Path, folder: Path) -> Tokenizer:
    from trtllm.frontends.detect import open_model

    for name, content in open_model(model).assets.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
    return Tokenizer.from_directory(folder)


def test_a_character_over_several_tokens_comes_whole(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte fallback"]
    ids = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "é日".encode()]
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in [*ids, tokenizer.token_to_id("▁the")]]
    assert pieces == ["", "", "", "", "", "é日 the"]
    stream = ByteLevelStream({0: "\u00c3", 1: "\u00a9"}.get)
    assert [stream.push(0), stream.push(1), stream.push(0), stream.flush()] == ["", "é", "", "\ufffd"]


def test_text_does_not_wait_for_the_end(tokenizers: dict[str, Tokenizer]) -> None:
    """All but what one more token may change is out: the bytes of a character, or the newest words."""
    for kind, tokenizer in tokenizers.items():
        plain = [token for token in range(1, tokenizer.vocab_size) if token not in tokenizer.special_token_ids]
        ids = [token for token in plain if not (tokenizer.id_to_token(token) or "").startswith("<0x")] * 3
        detokenizer = IncrementalDetokenizer(tokenizer)
        given = "".join(detokenizer.push(token) for token in ids)
        assert len(tokenizer.decode(ids)) - len(given) <= 8, kind


@pytest.mark.parametrize("kind", ["byte fallback", "wordpiece", "unigram", "undecoded"])
def test_a_token_costs_the_same_whatever_came_before(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    """The tokens handed to the library grow in proportion to the text."""
    tokenizer = tokenizers[kind]
    handed: list[int] = []

    def run(length: int) -> int:
        handed.clear()
        detokenizer = IncrementalDetokenizer(tokenizer)
        stream: Any = detokenizer._stream
        decode = stream._decode
        stream._decode = lambda ids: handed.append(len(ids)) or decode(ids)
        chosen = random.Random(1)
        for _ in range(length):
            detokenizer.push(chosen.randrange(tokenizer.vocab_size))
        return sum(handed)

    assert run(2000) <= 2.5 * run(1000)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(["'", " ", "n", "t", "s", "m", "ve", "re", ".", "a", ","]), max_size=40), st.data())
def test_cleaning_up_in_pieces_is_cleaning_up_the_whole(parts: list[str], data: st.DataObject) -> None:
    stream, text = CleanUpStream(), "".join(parts)
    cut = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *cut], [*cut, len(text)], strict=True)]
    assert "".join([*map(stream.push, pieces), stream.flush()]) == clean_up(text)
