"""What a calibrated engine keeps of its calibration, so that other weights can be calibrated on the same tokens."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.compiler.calibration.dataset import calibration_tokens
from trtllm.compiler.engine import Engine, EngineWriter
from trtllm.config import BuildConfig
from trtllm.errors import BadInputError

RECORD = "calibration.json"
TOKENS = "calibration_tokens.npy"
FILES = (RECORD, TOKENS)
LARGEST_KEPT = 1 << 20
"""Tokens that are kept themselves (4 MiB); of more only the hash is."""


def write_calibration(writer: EngineWriter, tokens: np.ndarray, build: BuildConfig) -> None:
    """Writes the record of int64 `tokens` [rows, length], and the tokens where they are few enough."""
    writer.write_json(
        RECORD,
        {
            "dataset": build.calib_dataset,
            "rows": tokens.shape[0],
            "length": tokens.shape[1],
            "tokens_sha256": _sha256(tokens),
        },
    )
    if tokens.size <= LARGEST_KEPT:
        payload = io.BytesIO()
        np.save(payload, tokens.astype(np.uint32))
        writer.write_bytes(TOKENS, payload.getvalue())


def kept_tokens(engine: Engine, checkpoint: Checkpoint, build: BuildConfig) -> np.ndarray | None:
    """The tokens that the engine was calibrated on: its own, or made of its text again and found to be the same.

    None for an engine without a record. Raises BadInputError when the record is damaged or the text is another one now.
    """
    if RECORD not in engine.manifest.files:
        return None
    record = _record(engine)
    if TOKENS in engine.manifest.files:
        try:
            tokens = np.load(engine.path / TOKENS).astype(np.int64)
        except (OSError, ValueError) as error:
            raise BadInputError(f"{engine.path / TOKENS} cannot be read: {error}", "copy the engine again") from None
        where = f"{engine.path / TOKENS} does not hold"
    else:
        tokens = calibration_tokens(checkpoint, build.calib_dataset, build.calib_size, build.calib_max_seq_length)
        where = f"{build.calib_dataset or 'the text of this version'} does not give"
    if _sha256(tokens) != record["tokens_sha256"]:
        raise BadInputError(
            f"{where} the {record['rows']} x {record['length']} tokens that {engine.path} was calibrated on",
            "put the text back as it was, or build the engine anew from the new weights: trtllm-build",
        )
    return tokens


def _record(engine: Engine) -> dict[str, Any]:
    path = engine.path / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("dataset", "rows", "length", "tokens_sha256")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInputError(f"{path} cannot be read: {error}", "copy the engine again") from None


def _sha256(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int64).data).hexdigest()
