"""The files that sentence-transformers puts beside a model, as far as a build reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trtllm.checkpoints.checkpoint import Checkpoint

POOLING = "1_Pooling/config.json"
MODULES = "modules.json"
LENGTH = "sentence_bert_config.json"


def sentence_file(checkpoint: Checkpoint, name: str) -> Any:
    """The JSON in one of the files, None when the model has no such file."""
    content = checkpoint.assets.get(name)
    if content is None:
        return None
    return json.loads(content if isinstance(content, bytes) else Path(content).read_bytes())


def published_length(checkpoint: Checkpoint) -> int | None:
    """Tokens to which sentence-transformers truncates a text for this model, None when it says nothing."""
    length = (sentence_file(checkpoint, LENGTH) or {}).get("max_seq_length")
    return length if isinstance(length, int) and length > 0 else None
