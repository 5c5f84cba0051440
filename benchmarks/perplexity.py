"""How much each quantization costs a model: perplexity, divergence from full precision, size and decode speed.

    python benchmarks/perplexity.py MODEL TEXT --engines DIR [--tokens 50000] [--context 1024]
        [--schemes none W8A16 W4A16 '{"quantization": "W4A16", "weight_scales": "search"}']

A scheme is a name or a JSON object of build options. Engines are built under DIR unless they are there, and score the
text side by side. The tokens are written to DIR/tokens.npy, for perplexity_llama.py to score the same ones. Results go
to DIR/perplexity.jsonl; a scheme that has its line is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np

DECODED = 64
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--schemes", nargs="+", default=["none", "W8A16", "W4A16", "W4A16_GPTQ"])
    arguments = parser.parse_args()
    arguments.engines.mkdir(parents=True, exist_ok=True)
    reference = engine_of(arguments, "none")
    tokens = tokens_of(reference, arguments.text, arguments.tokens)
    np.save(arguments.engines / "tokens.npy", tokens)
    results = arguments.engines / "perplexity.jsonl"
    known = {json.loads(line)["key"] for line in results.read_text().splitlines()} if results.exists() else set()
    keys = {scheme: f"{scheme} {len(tokens)} {arguments.context}" for scheme in arguments.schemes}
    missing = [scheme for scheme in arguments.schemes if keys[scheme] not in known]
    if missing:
        with results.open("a") as file:
            for scheme, line in zip(missing, measured(arguments, missing, reference, tokens), strict=True):
                file.write(json.dumps({"key": keys[scheme], **line}) + "\n")
    for line in results.read_text().splitlines():
        print(row(json.loads(line)))


def engine_of(arguments, scheme: str):
    """The engine of a scheme, built unless it is there."""
    from trtllm.compiler.engine import open_engine
    from trtllm.compiler.pipeline import build_engine
    from trtllm.config import build_config

    options = json.loads(scheme) if scheme.startswith("{") else {"quantization": scheme}
    if scheme == "none":
        options = {"dequantize": True}
    name = scheme if scheme.isidentifier() else hashlib.sha256(scheme.encode()).hexdigest()[:12]
    path = arguments.engines / name
    if path.exists():
        return open_engine(path, verify=False)
    limits = {"max_seq_len": arguments.context + DECODED, "max_batch_size": 1}
    return build_engine(arguments.model, path, build_config({**limits, **options}))


def tokens_of(engine, text: Path, count: int) -> np.ndarray:
    """The text's first tokens, none added."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(engine.path / "tokenizer.json"))
    return np.asarray(tokenizer.encode(text.read_text()[: 16 * count], add_special_tokens=False).ids[:count])


def measured(arguments, schemes: list[str], reference, tokens: np.ndarray) -> list[dict]:
    from trtllm.runtime.perplexity import perplexities

    engines, seconds = [], []
    for scheme in schemes:
        started = time.perf_counter()
        engines.append(engine_of(arguments, scheme))
        seconds.append(time.perf_counter() - started)
    found = perplexities(engines, tokens, arguments.context, reference=reference)
    return [described(*one) for one in zip(schemes, engines, found, seconds, decode_speeds(engines), strict=True)]


def described(scheme: str, engine, found, built: float, speed: float) -> dict:
    recipes = json.loads((engine.path / "recipes.json").read_text())
    table, rest = split_bytes(engine, recipes)
    return {
        "scheme": scheme,
        "perplexity": found.perplexity,
        "relative_error": found.standard_error,
        "divergence": found.divergence,
        "agreement": found.agreement,
        "weights_bytes": engine.manifest.weights_nbytes,
        "table_bytes": table,
        "layers_bytes": rest,
        "decode_tokens_per_second": speed,
        "build_seconds": built,
    }


def split_bytes(engine, recipes: dict) -> tuple[int, int]:
    """Bytes of what is made of the vocabulary's table (embedding, head), and of all other weights."""
    table = rest = 0
    for weight in engine.manifest.weights:
        of_table = any(word in json.dumps(recipes[weight.name]) for word in ("embed_tokens", "lm_head"))
        table, rest = (table + weight.nbytes, rest) if of_table else (table, rest + weight.nbytes)
    return table, rest


def decode_speeds(engines) -> list[float]:
    """Tokens per second of one sequence in each engine: the median step of the engine's best of interleaved rounds."""
    best = [0.0] * len(engines)
    for _ in range(ROUNDS):
        for index, engine in enumerate(engines):
            best[index] = max(best[index], decode_speed(engine))
    return best


def decode_speed(engine) -> float:
    """Tokens per second of one sequence, the median of its steps."""
    from trtllm.runtime.session import open_session

    session = open_session(engine, max_batch_size=1)
    table = np.arange(session.info.cache.num_blocks, dtype=np.int32)[None]
    tables = [table for _ in session.info.cache.groups]
    seconds = []
    for place in range(DECODED):
        started = time.perf_counter()
        one = [np.asarray([number]) for number in (place + 5, place, 0)]
        session.step(one[0], one[1], np.asarray([0, 1]), one[1], one[2], tables)
        seconds.append(time.perf_counter() - started)
    return 1 / float(np.median(seconds))


def row(line: dict) -> str:
    compared = f"| {line['divergence']:.4f} | {line['agreement']:.1%} "
    return (
        f"| {line['scheme']} | {line['weights_bytes'] / 1e6:.1f} | {line['layers_bytes'] / 1e6:.1f} "
        f"| {line['perplexity']:.3f} {compared}| {line['decode_tokens_per_second']:.0f} |"
    )


if __name__ == "__main__":
    main()
