"""Byte-level BPE tokenizers (`tokenizer.ggml.model` gpt2), with the word rule that `tokenizer.ggml.pre` names.

The rules are those of the models' own tokenizer.json; llama.cpp names them in `llama-vocab.cpp`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from trtllm.frontends.gguf.vocabulary import Vocabulary

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _CASED_REST
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
) + _CASED_REST


class UnknownTokenizer(Exception):
    """The vocabulary needs a rule that is not known here; the message says which."""


@dataclass(frozen=True)
class _WordRule:
    pattern: str | None = None
    """The words; None for GPT-2's own rule."""
    splits_digits: bool = False
    ignores_merges: bool = False
    """A word that is a token as a whole is taken whole."""
    composes: bool = False
    """Text is brought to Unicode form C first."""


_GPT2_RULE = _WordRule()
_DIGITS_RULE = _WordRule(splits_digits=True)
_LLAMA3_RULE = _WordRule(_LLAMA3, ignores_merges=True)
_QWEN2_RULE = _WordRule(_QWEN2, composes=True)
_RULES = {
    "gpt-2": _GPT2_RULE, "gpt2": _GPT2_RULE, "phi-2": _GPT2_RULE, "mpt": _GPT2_RULE, "olmo": _GPT2_RULE,
    "jina-es": _GPT2_RULE, "jina-de": _GPT2_RULE, "roberta-bpe": _GPT2_RULE,
    "smollm": _DIGITS_RULE, "starcoder": _DIGITS_RULE, "refact": _DIGITS_RULE, "command-r": _DIGITS_RULE,
    "codeshell": _DIGITS_RULE, "exaone": _DIGITS_RULE,
    "llama3": _LLAMA3_RULE, "llama-v3": _LLAMA3_RULE, "llama-bpe": _LLAMA3_RULE, "falcon3": _LLAMA3_RULE,
    "dbrx": _WordRule(_LLAMA3), "smaug-bpe": _WordRule(_LLAMA3),
    "qwen2": _QWEN2_RULE, "deepseek-r1-qwen": _QWEN2_RULE, "megrez": _QWEN2_RULE,
    "tekken": _WordRule(_TEKKEN, ignores_merges=True),
    "gpt-4o": _WordRule(_GPT4O), "llama4": _WordRule(_GPT4O),
}  # fmt: skip


def byte_level_tokenizer(vocabulary: Vocabulary) -> tuple[Tokenizer, tuple[str, ...]]:
    """The tokenizer without its special tokens. Raises UnknownTokenizer for a `pre` that is not in the table."""
    rule, notes = _rule(vocabulary)
    if vocabulary.merges is None:
        raise UnknownTokenizer("the byte-level tokenizer has no merges (tokenizer.ggml.merges)")
    vocab = {token: index for index, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, vocabulary.merges, ignore_merges=rule.ignores_merges))
    if rule.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(rule, vocabulary.add_space_prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, notes


def _rule(vocabulary: Vocabulary) -> tuple[_WordRule, tuple[str, ...]]:
    if vocabulary.pre in (None, "default"):
        return _GPT2_RULE, ("the file does not name its pre-tokenizer (tokenizer.ggml.pre): words are cut as by GPT-2",)
    try:
        return _RULES[str(vocabulary.pre)], ()
    except KeyError:
        raise UnknownTokenizer(f"pre-tokenizer '{vocabulary.pre}' is not known") from None


def _pre_tokenizer(rule: _WordRule, add_space_prefix: bool) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = []
    if rule.splits_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=add_space_prefix, use_regex=rule.pattern is None))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
