"""The environment variables that the toolchain reads, each with its type; nothing else reads the environment."""

from __future__ import annotations

import os
from pathlib import Path


def allows_n_greedy_decoding() -> bool:
    """TLLM_ALLOW_N_GREEDY_DECODING=1: greedy decoding may return the same sequence several times."""
    return os.environ.get("TLLM_ALLOW_N_GREEDY_DECODING") == "1"


def cache_root() -> Path:
    """Where engines and other results are kept: $TRTLLM_CACHE, or the user's cache folder of this toolchain."""
    own = os.environ.get("TRTLLM_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trtllm"
