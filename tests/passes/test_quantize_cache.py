"""Caches of 8 bits: what the pass makes of a graph, what an engine then says of its cache, and builds refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from trtllm import BuildConfig, compile
from trtllm.compiler.engine import open_engine
from trtllm.errors import TrtllmError, UsageError
from trtllm.runtime.session import open_session

TOKENS = np.random.default_rng(3).integers(0, 250, 41)
LENGTH = 64


def _build(model: Path, folder: Path, **options: object) -> Path:
    config = BuildConfig(max_batch_size=2, max_seq_len=LENGTH, **options)  # type: ignore[arg-type]
    compile(model, output_dir=folder, config=config)
    return folder


@pytest.mark.parametrize(("algorithm", "scale_bytes"), [("INT8", 2), ("FP8", 0)])
def test_the_engine_says_how_wide_its_cache_is(tiny_checkpoint, tmp_path, algorithm, scale_bytes) -> None:
    plain = json.loads((_build(tiny_checkpoint, tmp_path / "plain") / "config.json").read_text())
    config = json.loads(
        (_build(tiny_checkpoint, tmp_path / "e", kv_cache_quant_algo=algorithm) / "config.json").read_text()
    )
    sizes = {item["name"]: item["shape"] for item in plain["io"]["inputs"] if item["name"].startswith("past_key.")}
    total = 0
    for item in config["io"]["inputs"]:
        if item["name"].startswith("past_key."):
            _, heads, _, size = sizes[item["name"]]
            assert (item["dtype"], item["shape"][-1]) == ("UINT8", size + scale_bytes)
            total += 2 * heads * (size + scale_bytes)
    assert config["cache"]["groups"][0]["bytes_per_token"] == total
    assert config["passes"]["quantize-cache"] == len(sizes)


@pytest.mark.parametrize("algorithm", ["INT8", "FP8"])
def test_a_row_says_the_same_in_other_blocks_and_after_a_copy_of_its_blocks(
    tiny_checkpoint, tmp_path, algorithm
) -> None:
    engine = open_engine(_build(tiny_checkpoint, tmp_path / "e", kv_cache_quant_algo=algorithm))
    session = open_session(engine, threads=2)
    columns = -(-LENGTH // session.info.cache.tokens_per_block)
    table = np.arange(2 * columns, dtype=np.int32).reshape(2, columns)

    def step(row: int, start: int, stop: int, copies: object = ()) -> np.ndarray:
        positions = np.arange(start, stop)
        bounds, past = np.array([0, stop - start]), np.array([start])
        wanted = np.array([stop - start - 1])
        logits = session.step(TOKENS[start:stop], positions, bounds, past, wanted, [table[row : row + 1]], copies)
        return np.array(logits)

    step(0, 0, 41)
    copies = [(0, 0, columns, 32), (0, 1, columns + 1, 8)]
    np.testing.assert_array_equal(step(1, 40, 41, copies), step(0, 40, 41))
    np.testing.assert_array_equal(step(1, 0, 41), step(0, 0, 41))


def test_a_target_without_such_a_cache_says_so(tiny_checkpoint, tmp_path) -> None:
    with pytest.raises(UsageError, match="it takes no kv_cache_quant_algo"):
        _build(tiny_checkpoint, tmp_path / "e", kv_cache_quant_algo="INT8", target="tensorrt")


@pytest.mark.parametrize("options", [{"optimization_level": 1}, {"dtype": "float16"}])
def test_attention_that_is_not_paged_is_refused(tiny_checkpoint, tmp_path, options) -> None:
    with pytest.raises(TrtllmError, match="the cache of this build cannot be INT8"):
        _build(tiny_checkpoint, tmp_path / "e", kv_cache_quant_algo="INT8", **options)
