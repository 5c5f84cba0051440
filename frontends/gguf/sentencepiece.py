"""Sentencepiece BPE tokenizers (`tokenizer.ggml.model` llama): scored tokens, byte fallback, U+2581 for spaces."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, models, normalizers

from trtllm.frontends.gguf.vocabulary import TokenKind, Vocabulary

_SPACE = "\u2581"


def sentencepiece_tokenizer(vocabulary: Vocabulary) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer without its special tokens. Merges that the file lacks are derived from the vocabulary."""
    is_gemma = vocabulary.architecture.startswith("gemma")
    tokens = [_gemma_spelling(token) for token in vocabulary.tokens] if is_gemma else vocabulary.tokens
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = vocabulary.merges
    if merges is None:
        merges = derive_merges(vocab, _priorities(vocabulary, tokens, by_position=is_gemma))
    unknown = next(vocabulary.of_kind(TokenKind.UNKNOWN), None) or vocabulary.token("unk")
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    prefix = [normalizers.Prepend(_SPACE)] if vocabulary.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, spaces]) if prefix else spaces
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(content=" ", left=1, right=0)] if vocabulary.add_space_prefix else []
    tokenizer.decoder = decoders.Sequence([*decoding, *strip])
    return tokenizer, ()


def _gemma_spelling(token: str) -> str:
    """Gemma files write tokens of two or more spaces as spaces."""
    return _SPACE * len(token) if " " in token and not token.strip(" ") else token


def _priorities(vocabulary: Vocabulary, tokens: list[str], *, by_position: bool) -> dict[str, float]:
    """What merges are sorted by, the largest first: the score, but for Gemma the place in the vocabulary."""
    if by_position or vocabulary.scores is None:
        return {token: -index for index, token in enumerate(tokens)}
    return dict(zip(tokens, vocabulary.scores, strict=True))


def derive_merges(vocab: Mapping[str, int], priorities: Mapping[str, float]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, in the order of `transformers.tokenization_utils_base.generate_merges`."""
    merges = []
    for token, priority in priorities.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        local = [(left, right, priority) for left, right in pairs if left in vocab and right in vocab]
        merges.extend(sorted(local, key=lambda merge: (vocab[merge[0]], vocab[merge[1]])))
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    return [(left, right) for left, right, _ in merges]
