"""Text embeddings from an encoder's engine directory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from trtllm.compiler.engine import Engine, open_engine
from trtllm.errors import UsageError
from trtllm.runtime.session import open_session
from trtllm.runtime.tokenizer import Tokenizer


class Embedder:
    """A loaded encoder engine.

    Args:
        model: an engine directory.
        threads: compute threads; all cores by default.
        verify: recompute every file's hash before loading (about a second per gigabyte).

    Use it as a context manager, or call `shutdown` when done.
    """

    def __init__(self, model: str | Path | Engine, *, threads: int | None = None, verify: bool = True) -> None:
        self.engine = model if isinstance(model, Engine) else open_engine(model, verify=verify)
        facts, build = self.engine.config["model"], self.engine.config["build_config"]
        if facts["kind"] != "encoder":
            raise UsageError(f"{self.engine.path} is a decoder, which generates", "use trtllm.LLM")
        if not facts["embedding_size"]:
            raise UsageError(
                f"{self.engine.path} was built with pooling 'none' and gives states, not embeddings",
                "rebuild it with --pooling mean",
            )
        self.embedding_size: int = facts["embedding_size"]
        self.max_tokens: int = min(build["max_seq_len"], facts["max_positions"])
        """Tokens of the longest text, special ones included; longer texts are cut."""
        self.tokenizer = Tokenizer.from_directory(self.engine.path)
        self._vocab_size: int = facts["vocab_size"]
        self._max_batch_size: int = build["max_batch_size"]
        self._max_batch_tokens: int = max(build["max_num_tokens"], self.max_tokens)
        self._threads = threads
        self._session: Any = open_session(self.engine, threads=threads)

    def embed(self, texts: str | Sequence[str]) -> np.ndarray:
        """One vector a text, in their order: float32 [N, embedding_size]; a single string gives N = 1."""
        texts = [texts] if isinstance(texts, str) else texts
        return self.embed_tokens([self._tokens(text) for text in texts])

    def embed_tokens(self, sequences: Sequence[Sequence[int]]) -> np.ndarray:
        """The same for token ids, special tokens included.

        Raises UsageError for a sequence that is empty, longer than `max_tokens`, or holds an unknown id.
        """
        for sequence in sequences:
            self._check(sequence)
        result = np.empty((len(sequences), self.embedding_size), np.float32)
        session = self._live_session()
        for batch in self._batches([len(sequence) for sequence in sequences]):
            tokens, lengths = _padded([sequences[index] for index in batch])
            result[batch] = session.encode(tokens, lengths)
        return result

    def take(self, engine: Engine) -> None:
        """Goes on with another engine of the same graph; calls under way finish with the old one."""
        self._live_session()
        self._session, self.engine = open_session(engine, threads=self._threads), engine

    def shutdown(self) -> None:
        """Releases the engine; the object cannot embed afterwards."""
        self._session = None

    def __enter__(self) -> Embedder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _live_session(self) -> Any:
        if self._session is None:
            raise UsageError("this Embedder has been shut down", "make a new one")
        return self._session

    def _check(self, sequence: Sequence[int]) -> None:
        if not 0 < len(sequence) <= self.max_tokens:
            raise UsageError(
                f"a text has {len(sequence)} tokens, the engine takes 1 to {self.max_tokens}",
                "shorten it, or rebuild with a larger --max-seq-len",
            )
        outside = next((token for token in sequence if not 0 <= token < self._vocab_size), None)
        if outside is not None:
            raise UsageError(
                f"token id {outside} is outside the vocabulary of {self._vocab_size}", "use this engine's tokenizer"
            )

    def _tokens(self, text: str) -> list[int]:
        """Token ids with special tokens; of a long text the end is cut and the special tokens are kept."""
        ids = self.tokenizer.encode(text)
        if len(ids) <= self.max_tokens:
            return ids
        content = self.tokenizer.encode(text, add_special_tokens=False)
        before = _where(content, ids)
        after = ids[before + len(content) :]
        kept = self.max_tokens - before - len(after)
        if kept < 1:
            raise UsageError(
                f"max_seq_len {self.max_tokens} leaves no room between the special tokens", "rebuild with a larger one"
            )
        return ids[:before] + content[:kept] + after

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of texts of similar length, the longest first, within the engine's batch size and token budget."""
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            padded = (len(batch) + 1) * lengths[batch[0] if batch else index]
            if batch and (len(batch) == self._max_batch_size or padded > self._max_batch_tokens):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


def _where(content: list[int], ids: list[int]) -> int:
    """The position at which `content` lies in `ids`: how many special tokens come before the text."""
    spare = len(ids) - len(content)
    found = next((start for start in range(spare + 1) if ids[start : start + len(content)] == content), None)
    assert found is not None, "special tokens surround a text and leave it whole"
    return found


def _padded(sequences: list[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """int64 [rows, longest] padded with zeros at the right, and int64 [rows] lengths."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    tokens = np.zeros((len(sequences), lengths.max()), np.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens, lengths
