"""llama.cpp's perplexity on the tokens that perplexity.py wrote, in the same windows: the judge of our quantizations.

    python benchmarks/perplexity_llama.py SOURCE.gguf --engines DIR [--types Q4_K_M Q4_0 Q8_0] [--context 1024]

Needs llama-cpp-python alone, and quantizes the source with llama.cpp's own quantizer. Divergence is from the source.
"""

from __future__ import annotations

import argparse
import ctypes
import math
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--engines", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["Q4_K_M"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    tokens = np.load(arguments.engines / "tokens.npy")
    source = opened(arguments.source, arguments)
    for name in arguments.types:
        path = arguments.engines / f"{name}.gguf"
        if not path.exists():
            quantize(arguments.source, path, name)
        loss, divergence, agreement = compare(opened(path, arguments), source, tokens, arguments.context)
        print(
            f"| llama.cpp {name} | {path.stat().st_size / 1e6:.1f} | {math.exp(loss):.3f} | {divergence:.4f} "
            f"| {agreement:.1%} |",
            flush=True,
        )


def quantize(source: Path, target: Path, name: str) -> None:
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    parameters.allow_requantize = True
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters))
    if code:
        raise SystemExit(f"llama.cpp could not quantize {source} to {name}: code {code}")


def opened(path: Path, arguments) -> llama_cpp.Llama:
    return llama_cpp.Llama(
        str(path), n_ctx=arguments.context, n_batch=128, n_threads=arguments.threads, logits_all=True, verbose=False
    )


def compare(model, reference, tokens: np.ndarray, context: int) -> tuple[float, float, float]:
    """Nats per token, mean divergence from the reference, and share of equal likeliest tokens."""
    losses, divergence, agreed, count = 0.0, 0.0, 0, 0
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context]
        own, other = (log_softmax(logits(engine, window))[: len(window) - 1] for engine in (model, reference))
        losses -= float(own[np.arange(len(window) - 1), window[1:]].sum(dtype=np.float64))
        divergence += float(np.einsum("nv,nv->", np.exp(other), other - own, dtype=np.float64))
        agreed += int(np.count_nonzero(own.argmax(-1) == other.argmax(-1)))
        count += len(window) - 1
    return losses / count, divergence / count, agreed / count


def logits(model, window: np.ndarray) -> np.ndarray:
    model.reset()
    model.eval(window.tolist())
    return model.scores[: len(window)]


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


if __name__ == "__main__":
    main()
