"""What config.json says of an engine's cache: its kind, and the groups of layers that share block tables."""

from __future__ import annotations

from typing import Any

from trtllm.compiler.compiled import Compiled
from trtllm.compiler.estimates import cache_nbytes_per_token
from trtllm.compiler.ir.network import TOKENS_PER_BLOCK, CacheGroup


def cache_record(compiled: Compiled) -> dict[str, Any]:
    """Kind "paged" with its groups, or "linear": one group, whose block is the whole cache of a row."""
    network = compiled.network
    everything = (CacheGroup(0, tuple(range(len(network.info.cache)))),)
    groups = [
        {
            "window": group.window,
            "layers": list(group.layers),
            "bytes_per_token": cache_nbytes_per_token(compiled, group.layers),
        }
        for group in network.cache_groups or everything
    ]
    if not network.cache_groups:
        return {"kind": "linear", "groups": groups}
    return {"kind": "paged", "tokens_per_block": TOKENS_PER_BLOCK, "groups": groups}
