"""The memory of a cache: the blocks of every layer in a primary and a host pool, and copies between blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from trtllm.errors import UsageError
from trtllm.runtime.session import CacheShape
from trtllm.runtime.sessions.onnxruntime_library import NUMPY_TYPES

BlockCopy = tuple[int, int, int, int]
"""Group, source, destination, tokens."""


class BlockPool:
    """Keys and values of every layer as [blocks, kv heads, tokens of a block, head size].

    Pages of memory are the system's until something is written to them, so that a pool costs what it holds.
    """

    def __init__(self, config: Mapping[str, Any], shape: CacheShape) -> None:
        inputs = {item["name"]: item for item in config["io"]["inputs"]}
        self._num_blocks = shape.num_blocks
        self._total = shape.num_blocks + shape.num_host_blocks
        self._tokens_per_block = shape.tokens_per_block
        self.arrays: dict[str, np.ndarray] = {}
        """By the name of the graph input that reads them."""
        self._groups: list[list[tuple[np.ndarray, np.ndarray]]] = []
        for layers in layers_of_groups(config):
            group = []
            for name in (f"{kind}.{layer}" for layer in layers for kind in ("past_key", "past_value")):
                _, heads, _, size = inputs[name]["shape"]
                dtype = NUMPY_TYPES[inputs[name]["dtype"]]
                block = (heads, shape.tokens_per_block, size)
                self.arrays[name] = np.zeros((shape.num_blocks, *block), dtype)
                group.append((self.arrays[name], np.zeros((shape.num_host_blocks, *block), dtype)))
            self._groups.append(group)

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copies the first tokens of blocks to others, in order. Raises UsageError for blocks that do not exist."""
        for group, source, destination, num_tokens in copies:
            if not (0 <= source < self._total and 0 <= destination < self._total and 0 <= group < len(self._groups)):
                raise UsageError(
                    f"a copy from block {source} to {destination} of group {group} leaves the pool",
                    f"the cache has {self._total} blocks in each of {len(self._groups)} groups",
                )
            for pools in self._groups[group]:
                to, to_index = self._place(pools, destination)
                origin, from_index = self._place(pools, source)
                if num_tokens >= self._tokens_per_block:
                    to[to_index] = origin[from_index]
                else:
                    to[to_index, :, :num_tokens] = origin[from_index, :, :num_tokens]

    def _place(self, pools: tuple[np.ndarray, np.ndarray], block: int) -> tuple[np.ndarray, int]:
        return (pools[0], block) if block < self._num_blocks else (pools[1], block - self._num_blocks)


def layers_of_groups(config: Mapping[str, Any]) -> list[list[int]]:
    """The layers of each cache group of an engine's config.json; engines that do not say so have one group."""
    record = config.get("cache")
    if record is None:
        return [list(range(len(config["model"]["cache"])))]
    return [group["layers"] for group in record["groups"]]
