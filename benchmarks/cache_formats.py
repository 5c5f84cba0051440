"""How fast a long context decodes with each format of the key-value cache, and what the cache takes.

    python benchmarks/cache_formats.py MODEL --engines DIR [--context 2000] [--rounds 8] [--quantization W8A16]

Engines are built under DIR unless they are there. Each fills its cache with the same tokens, then they take turns
and whatever else the machine does meets all of them: a round is 16 single tokens at the same places.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

FORMATS = {"float": None, "int8": "INT8", "fp8": "FP8"}
STEPS, CHUNK = 16, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quantization", default="W8A16")
    arguments = parser.parse_args()
    rows = {name: Row(engine_of(arguments, name), arguments.context) for name in FORMATS}
    for _ in range(arguments.rounds):
        for row in rows.values():
            row.round()
    for name, row in rows.items():
        milliseconds = 1e3 * np.asarray(row.seconds)
        found = {
            "cache": name,
            "bytes_per_token": row.bytes_per_token,
            "median_ms": float(np.median(milliseconds)),
            "fastest_tenth_ms": float(np.quantile(milliseconds, 0.1)),
        }
        print(json.dumps(found))


def engine_of(arguments: argparse.Namespace, name: str):
    """The engine of a format, built unless it is there."""
    from trtllm.compiler.engine import open_engine
    from trtllm.compiler.pipeline import build_engine
    from trtllm.config import build_config

    path = arguments.engines / f"{arguments.quantization}-{name}"
    if path.exists():
        return open_engine(path, verify=False)
    options = {"quantization": arguments.quantization, "kv_cache_quant_algo": FORMATS[name]}
    limits = {"max_seq_len": arguments.context + STEPS + 1, "max_input_len": arguments.context, "max_batch_size": 1}
    return build_engine(arguments.model, path, build_config({**limits, **options}))


class Row:
    """One sequence whose context is computed, and the seconds of its next tokens."""

    def __init__(self, engine, context: int) -> None:
        from trtllm.runtime.session import open_session

        self._session = open_session(engine, max_batch_size=1)
        self._context = context
        self.seconds: list[float] = []
        cache = self._session.info.cache
        self.bytes_per_token = sum(group["bytes_per_token"] for group in engine.config["cache"]["groups"])
        table = np.arange(cache.num_blocks, dtype=np.int32)[None]
        self._tables = [table for _ in cache.groups]
        tokens = np.random.default_rng(1).integers(1000, 40000, context)
        for start in range(0, context, CHUNK):
            self._step(tokens[start : start + CHUNK], start)

    def _step(self, tokens: np.ndarray, start: int) -> None:
        count = len(tokens)
        places = np.arange(start, start + count)
        last = np.asarray([count - 1])
        self._session.step(tokens, places, np.asarray([0, count]), np.asarray([start]), last, self._tables)

    def round(self) -> None:
        for place in range(self._context, self._context + STEPS):
            token = np.asarray([place % 40000 + 5])
            started = time.perf_counter()
            self._step(token, place)
            self.seconds.append(time.perf_counter() - started)


if __name__ == "__main__":
    main()
