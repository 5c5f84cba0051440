"""A checkpoint: a model's config, its tensors by name (specs now, payloads later) and its tokenizer files.

Frontends make it, model builders and the recipe reader use it. It knows no graph and no file format.
Tensor names and shapes are those of the Hugging Face model of the same architecture, whatever the source was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trtllm.dtypes import DType
from trtllm.errors import BadInputError


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and element type of a tensor, without its payload."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def elements(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def nbytes(self) -> int:
        return self.dtype.byte_size(self.elements)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.value}[{'x'.join(map(str, self.shape))}]"


class LazyTensor(Protocol):
    """A tensor whose payload is read on demand, whole or by rows."""

    @property
    def spec(self) -> TensorSpec: ...

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start:stop` of the first axis in the storage form of `spec.dtype`; a fresh array.

        A scalar is read whole. Raises BadInputError when the file ends early.
        """
        ...


@dataclass(frozen=True, eq=False)
class FunctionTensor:
    """A lazy tensor from a function of the row range."""

    spec: TensorSpec
    rows: Callable[[int, int], np.ndarray]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        extent = self.spec.shape[0] if self.spec.shape else 1
        return self.rows(start, extent if stop is None else stop)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One published model as a frontend found it."""

    format: str
    """What the frontend recognised: "huggingface", "gguf", "transformers" (an object in memory)."""
    source: str
    """The path, hub id or class name it came from, for messages."""
    architecture: str
    """The Hugging Face class name, for example "LlamaForCausalLM"."""
    config: Mapping[str, Any]
    """config.json of the text model, with the source's own keys."""
    tensors: Mapping[str, LazyTensor]
    assets: Mapping[str, bytes | Path] = field(default_factory=dict)
    """Files for the engine directory by name: tokenizer.json, tokenizer_config.json, chat_template.jinja, ..."""
    notes: tuple[str, ...] = ()
    """What the user should be told of the reading: dequantized tensors, ignored files."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as the source stores them (after any dequantization by the frontend)."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def spec(self, name: str) -> TensorSpec:
        try:
            return self.tensors[name].spec
        except KeyError:
            raise BadInputError(
                f"{self.source} has no tensor '{name}'", "the checkpoint is incomplete; fetch it again"
            ) from None
