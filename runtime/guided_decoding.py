"""Output that follows a schema, an expression or a grammar: what users ask for, and the constraint that holds it.

Constraints are made by `llguidance`, which needs neither torch nor transformers and is imported on first use.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.errors import TargetError, UsageError
from trtllm.records import record

BACKENDS = ("llguidance",)
_TAG_SHAPE = 'pass {"structures": [{"begin": "<f>", "schema": {...}, "end": "</f>"}], "triggers": ["<f"]}'
_KEPT_TOKENIZERS = 8
_KINDS = ("json", "regex", "grammar", "json_object", "choice", "structural_tag")


@record
class GuidedDecodingParams:
    """Exactly one of:

    json: a JSON schema as dict or text, or a pydantic model class
    regex: a regular expression that the whole output matches
    grammar: EBNF; GBNF as llama.cpp and xgrammar write it (`root ::= ...`), or Lark (`start: ...`)
    json_object: any JSON object
    choice: one of these texts
    structural_tag: {"structures": [{"begin", "schema", "end"}], "triggers": [...]} as dict or text: free text, and
        after each `begin` JSON by its schema up to `end`
    """

    json: Any = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    choice: list[str] | None = None
    structural_tag: Any = None

    def problems(self) -> Iterator[str]:
        """What is wrong with fields taken together."""
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            yield f"give exactly one of {', '.join(_KINDS)}, not {' and '.join(given) or 'none'}"
        if self.choice is not None and not any(self.choice):
            yield "choice is empty"


class GuidedDecoder:
    """Makes constraints for one engine: its tokenizer, its end tokens, and its vocabulary with padding. Thread safe."""

    def __init__(self, tokenizer_file: Path | None, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._file = tokenizer_file
        self._vocab_size = vocab_size
        self._end_ids = tuple(end_ids)
        self._tokenizers: dict[tuple[int, ...], Any] = {}
        self._lock = threading.Lock()

    def constraint(self, params: GuidedDecodingParams, end_ids: Sequence[int] = ()) -> Constraint:
        """A constraint at its beginning; `end_ids` may come where the output is complete, the engine's by default.

        Raises UsageError for a schema or grammar that is invalid or that no text satisfies.
        """
        library = _library()
        tokenizer = self._tokenizer(library, tuple(end_ids) or self._end_ids)
        matcher = library.LLMatcher(tokenizer, _grammar(library, tokenizer, params), log_level=0)
        if matcher.is_error():
            raise UsageError(f"guided_decoding: {_first_line(matcher.get_error())}", "correct the schema or grammar")
        constraint = Constraint(matcher, self._vocab_size)
        if not constraint.allows_any():
            raise UsageError("guided_decoding: no text satisfies it", "correct the schema or grammar")
        return constraint

    def _tokenizer(self, library: Any, end_ids: tuple[int, ...]) -> Any:
        with self._lock:
            if end_ids not in self._tokenizers:
                if len(self._tokenizers) >= _KEPT_TOKENIZERS:
                    self._tokenizers.clear()
                self._tokenizers[end_ids] = self._new_tokenizer(library, end_ids)
            return self._tokenizers[end_ids]

    def _new_tokenizer(self, library: Any, end_ids: tuple[int, ...]) -> Any:
        if self._file is None:
            raise UsageError(
                "guided decoding needs a tokenizer, which this engine has not", "build the engine with one"
            )
        text = self._file.read_text(encoding="utf-8")
        try:
            return library.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(end_ids) or None)
        except (ValueError, RuntimeError) as error:
            raise UsageError(f"guided decoding cannot use this tokenizer: {_first_line(str(error))}") from None


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise TargetError(
            "guided decoding needs the package llguidance", 'install it: pip install "trtllm-toolchain[guided]"'
        ) from None
    return llguidance


class Constraint:
    """The state of one sequence in its grammar; the executor calls it between steps."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = (vocab_size + 31) // 32

    def fill(self, mask: np.ndarray) -> bool:
        """Sets bit t % 32 of word t / 32 of `mask` uint32 [ceil(V / 32)] for every token t that may come next."""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, mask.view(np.int32).reshape(1, -1), 0)
        if self._matcher.is_error():
            raise UsageError(f"guided_decoding: {_first_line(self._matcher.get_error())}", "simplify the grammar")
        return True

    def accept(self, token: int) -> None:
        """The token was chosen."""
        if self._matcher.is_stopped():
            return
        if not self._matcher.consume_token(token):
            raise UsageError(f"guided_decoding: {_first_line(self._matcher.get_error())}", "simplify the grammar")

    def clone(self) -> Constraint:
        """The same state for another sequence."""
        copy = Constraint.__new__(Constraint)
        copy._matcher, copy._words = self._matcher.deep_copy(), self._words
        return copy

    def allows_any(self) -> bool:
        mask = np.zeros(self._words, np.uint32)
        self.fill(mask)
        return bool(mask.any())


def _grammar(library: Any, tokenizer: Any, params: GuidedDecodingParams) -> str:
    """The library's own form of a grammar."""
    try:
        return str(_grammar_of(library, tokenizer, params))
    except UsageError:
        raise
    except Exception as error:  # the library's converters raise plain exceptions
        raise UsageError(f"guided_decoding: {_first_line(str(error))}", "correct the schema or grammar") from None


def _grammar_of(library: Any, tokenizer: Any, params: GuidedDecodingParams) -> Any:
    matcher = library.LLMatcher
    if params.json is not None:
        return matcher.grammar_from_json_schema(json.dumps(_schema(params.json)))
    if params.json_object:
        return matcher.grammar_from_json_schema('{"type": "object"}')
    if params.regex is not None:
        return matcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        return matcher.grammar_from_regex("|".join(re.escape(text) for text in params.choice))
    if params.structural_tag is not None:
        tags = _tags(library, params.structural_tag)
        special = all(_is_special(tokenizer, tag.trigger) for tag in tags)
        return library.StructTag.to_grammar(tags, assume_special=special)
    assert params.grammar is not None
    if "::=" in params.grammar:
        from llguidance.gbnf_to_lark import any_to_lark

        return matcher.grammar_from_lark(any_to_lark(params.grammar))
    return matcher.grammar_from_lark(params.grammar)


def _schema(given: Any) -> Any:
    """A JSON schema from a dict, its text, or a pydantic model class."""
    make = getattr(given, "model_json_schema", None)
    if callable(make):
        return make()
    schema = _json(given, "json") if isinstance(given, str) else given
    if not isinstance(schema, dict | bool):
        raise UsageError(
            f"guided_decoding: json is a {type(given).__name__}, expected a schema",
            "pass a dict, JSON text, or a pydantic model class",
        )
    return schema


def _tags(library: Any, given: Any) -> list[Any]:
    data = _json(given, "structural_tag") if isinstance(given, str) else given
    structures = data.get("structures") if isinstance(data, Mapping) else None
    if not isinstance(structures, Sequence) or not structures:
        raise UsageError("guided_decoding: structural_tag has no 'structures'", _TAG_SHAPE)
    return [_tag(library, structure, data.get("triggers") or ()) for structure in structures]


def _tag(library: Any, structure: Any, triggers: Sequence[str]) -> Any:
    missing = [key for key in ("begin", "schema", "end") if not isinstance(structure, Mapping) or key not in structure]
    if missing:
        raise UsageError(f"guided_decoding: a structure of structural_tag has no {', '.join(missing)}", _TAG_SHAPE)
    begin = structure["begin"]
    trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None if triggers else begin)
    if not trigger:
        raise UsageError(f"guided_decoding: no trigger begins '{begin}'", _TAG_SHAPE)
    return library.StructTag(trigger=trigger, begin=begin, grammar=_schema(structure["schema"]), end=structure["end"])


def _is_special(tokenizer: Any, text: str) -> bool:
    """Whether `text` is one special token, which no characters can spell."""
    tokens = tokenizer.tokenize_str(text, parse_special=True)
    return len(tokens) == 1 and bool(tokenizer.is_special_token(tokens[0]))


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"guided_decoding: {what} is no JSON: {error}", "pass a dict, or correct the text") from None


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "unknown error")[:300]
