"""What config.json says of an engine's cache: its kind, and the groups of layers that share block tables."""

from __future__ import annotations

from typing import Any

from trtllm.compiler.compiled import Compiled
from trtllm.compiler.estimates import cache_nbytes_per_token
from trtllm.compiler.ir.network import TOKENS_PER_BLOCK, CacheGroup
from trtllm.passes.gather_cache import cache_blocks


def cache_record(compiled: Compiled) -> dict[str, Any]:
    """Kind "paged" with its groups, "linear": one group, whose block is the whole cache of a row, or "gathered".

    A gathered cache has `num_blocks` blocks of every layer, which the graph reads through `block_table` and does not
    write: `present_key.N` and `present_value.N` are new rows [batch, tokens, kv heads, head size], which the session
    puts into the blocks. What no row was written to must be finite.
    """
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
    if compiled.target.capabilities.gathers_cache:
        build = compiled.build
        return {
            "kind": "gathered",
            "tokens_per_block": build.tensorrt_tokens_per_block,
            "num_blocks": cache_blocks(build),
            "candidates": 0 if build.gather_context_logits else min(build.logits_candidates, network.info.vocab_size),
            "groups": groups,
        }
    if not network.cache_groups:
        return {"kind": "linear", "groups": groups}
    return {"kind": "paged", "tokens_per_block": TOKENS_PER_BLOCK, "groups": groups}
