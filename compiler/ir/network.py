"""What a model builder hands to the passes: the graph, and what the engine must know beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir

TOKENS_PER_BLOCK = 32
"""Of a paged cache, unless the session that opens the engine chooses another size: graphs take any."""


@dataclass(frozen=True)
class CacheLayer:
    """Key-value cache of one attention layer; window 0 means it sees everything."""

    num_kv_heads: int
    head_size: int
    window: int = 0


@dataclass(frozen=True)
class CacheGroup:
    """Layers that see equally far back and so share a block table."""

    window: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelInfo:
    """The facts of a model that the runtime and the reports read."""

    kind: Literal["decoder", "encoder"]
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    cache: tuple[CacheLayer, ...] = ()
    embedding_size: int = 0

    def to_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)


@dataclass(eq=False)
class Network:
    """A model on its way through the passes."""

    model: ir.Model
    info: ModelInfo
    cache_groups: tuple[CacheGroup, ...] = ()
    """Of a graph over packed tokens and a paged cache; empty while rows are padded and each has a cache of its own."""

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph
