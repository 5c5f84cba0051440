"""Compares what the plans of tiny models compute with what transformers computed, `expected.npz` of each folder.

    python tests/gpu/run_tiny.py build/gpu/tiny --json build/gpu/tiny.json

FOLDER holds NAME/engine beside NAME/expected.npz (make_packages.py, build_plans.py). A decoder gets its prompts in
chunks of different lengths and then single tokens, every row at its own place; an encoder gets its rows as they are.
The exit status is 0 when all agree.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.compiler.engine import Engine, open_engine
from trtllm.runtime.cuda.driver import open_device
from trtllm.runtime.executor import open_engine_session
from trtllm.runtime.llm_config import LlmArgs
from trtllm.runtime.sessions.tensorrt_library import Plan

TOLERANCES = {"float32": 1e-3, "float16": 2e-2}
"""Of a row's largest magnitude. These weights are large, so that halves round more than a trained model's would."""
PROMPTS = (9, 14, 3)


def decoder_error(engine: Engine, ids: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of any row's logits after its prompt and after every token behind it."""
    session = open_engine_session(engine, LlmArgs())
    cache = session.info.cache
    columns = -(-session.info.max_seq_len // cache.tokens_per_block)
    needed = -(-ids.shape[1] // cache.tokens_per_block)
    rows = len(ids)
    table = np.zeros((rows, columns), np.int32)
    table[:, :needed] = np.random.default_rng(0).permutation(rows * needed).reshape(rows, needed)
    tables = [table] * len(cache.groups)
    past, counts, errors = np.zeros(rows, np.int64), np.array(PROMPTS), []
    while (past + counts).max() <= ids.shape[1]:
        starts = np.cumsum([0, *counts])
        tokens = np.concatenate([ids[row, past[row] : past[row] + counts[row]] for row in range(rows)])
        positions = np.concatenate([np.arange(past[row], past[row] + counts[row]) for row in range(rows)])
        logits = session.step(tokens.astype(np.int64), positions, starts, past, starts[1:] - 1, tables)
        past = past + counts
        counts = np.ones(rows, np.int64)
        errors += [relative(logits[row], expected[row, past[row] - 1]) for row in range(rows)]
    return max(errors)


def encoder_error(engine: Engine, ids: np.ndarray, expected: np.ndarray) -> float:
    """The largest error of any token's last hidden state."""
    device = open_device()
    device.make_current()
    stream, plan = device.stream(), Plan(engine, device)
    rows, length = ids.shape
    arrays = {"input_ids": ids.astype(np.int32), "lengths": np.full(rows, length, np.int32)}
    (output,) = [info for info in plan.tensors.values() if not info.is_input]
    kind = {4: np.float32, 2: np.float16}[output.item_nbytes]
    host, keep = device.pinned(expected.size * output.item_nbytes), []
    scratch = device.allocate(plan.scratch_nbytes)
    context = plan.context(0, scratch.address, stream)
    for name, array in arrays.items():
        pinned, memory = device.pinned(array.nbytes), device.allocate(array.nbytes)
        pinned.bytes[: array.nbytes] = array.reshape(-1).view(np.uint8)
        device.to_device(memory.address, pinned.address, array.nbytes, stream)
        context.set_input(name, array.shape, memory.address)
        keep += [pinned, memory]
    result = device.allocate(expected.size * output.item_nbytes)
    context.set_address(output.name, result.address)
    context.enqueue(stream)
    device.to_host(host.address, result.address, expected.size * output.item_nbytes, stream)
    device.synchronize(stream)
    found = host.bytes[: expected.size * output.item_nbytes].view(kind).reshape(expected.shape).astype(np.float32)
    return max(relative(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference against the largest magnitude; infinite for what is not a number."""
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    return error if np.isfinite(error) else float("inf")


def compared(folder: Path) -> dict[str, Any]:
    """One model's finding."""
    dtype = folder.name.rsplit("-", 1)[-1]
    try:
        engine = open_engine(folder / "engine")
        with np.load(folder / "expected.npz") as arrays:
            ids, expected = arrays["input_ids"], arrays["expected"]
        is_decoder = engine.config["model"]["kind"] == "decoder"
        error = (decoder_error if is_decoder else encoder_error)(engine, ids, expected)
    except Exception as problem:
        return {"model": folder.name, "holds": False, "error": f"{type(problem).__name__}: {problem}"}
    return {"model": folder.name, "holds": error <= TOLERANCES[dtype], "worst": error, "limit": TOLERANCES[dtype]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    results = []
    for expected in sorted(arguments.folder.glob("*/expected.npz")):
        results.append(compared(expected.parent))
        print(json.dumps(results[-1]), flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if results and all(result["holds"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
