"""Wordpiece tokenizers (`tokenizer.ggml.model` bert), whose files mark word beginnings instead of continuations."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from trtllm.frontends.gguf.vocabulary import Vocabulary

_WORD_START = "\u2581"
_CONTINUATION = "##"


def wordpiece_tokenizer(vocabulary: Vocabulary) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer without its special tokens; case is folded when no token has an upper-case letter."""
    vocab = {_published_spelling(token): index for index, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.token("unk") or "[UNK]"
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=100))
    lowercase = not any("A" <= letter <= "Z" for token in vocab if not _is_special(token) for letter in token)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_CONTINUATION)
    case = "folded" if lowercase else "kept"
    return tokenizer, (f"the file does not say whether case matters: case is {case}, as its tokens imply",)


def _is_special(token: str) -> bool:
    return token.startswith("[") and token.endswith("]")


def _published_spelling(token: str) -> str:
    """convert_hf_to_gguf wrote `##x` as `x` and `x` as U+2581 `x`."""
    if _is_special(token):
        return token
    return token[1:] if token.startswith(_WORD_START) else _CONTINUATION + token
