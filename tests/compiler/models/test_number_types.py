"""Engines in float16 and with integer weights: equal to transformers within what their rounding explains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm.checkpoints.quantize import quantize_blocks
from trtllm.compiler.ir.weights import unpack_int4
from trtllm.compiler.pipeline import build_engine
from trtllm.config import build_config
from trtllm.quantization import SCHEMES
from trtllm.runtime.session import open_session

PROMPT, STEPS = 17, 4
QUANTIZED = ("llama", "llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mixtral", "qwen3-moe")
ROUNDINGS = {"float16": 12, "int8": 7}
"""Results rounded in a layer: every operator's in float16, the input of every product where products are of int8."""


def tolerance(kind: str, layers: int, logits: np.ndarray) -> float:
    """The root mean square error that independent roundings of a relative size add up to: size * root of their number.

    float16: a result is off by at most eps/2 of itself. int8: a block of 32 activations is stored in steps of its
    largest element / 127; the largest of 32 is 2.4 standard deviations where values are normal, more behind a gated
    activation, say 3; an error even over a step has step / sqrt(12). Two layers: 2.6 % of the logits.
    """
    size = {"float16": np.finfo(np.float16).eps / 2, "int8": 3 / 127 / np.sqrt(12)}[kind]
    return float(size * np.sqrt(ROUNDINGS[kind] * layers + 1) * root_mean_square(logits))


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.fixture(scope="module")
def row() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 128, PROMPT + STEPS)


@pytest.fixture(scope="module")
def run(rows_of: Callable[[Any], Any]) -> Callable[..., np.ndarray]:
    def run_engine(model: Any, row: np.ndarray, folder: Path, **options: Any) -> np.ndarray:
        return logits_of(rows_of, model, row, folder, **options)

    return run_engine


def logits_of(rows_of: Callable[[Any], Any], model: Any, row: np.ndarray, folder: Path, **options: Any) -> np.ndarray:
    """Logits [T, V] of an engine of the model, by a prompt and then single tokens."""
    options = {"gather_context_logits": True, "max_seq_len": 32, "max_batch_size": 1, **options}
    rows = rows_of(open_session(build_engine(model, folder, build_config(options)), threads=1))
    parts = [*rows.step((0, row[:PROMPT], 0))]
    for position in range(PROMPT, len(row)):
        parts += rows.step((0, row[position : position + 1], position))
    return np.concatenate(parts)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_float16_differs_from_transformers_by_its_rounding(
    variant: Any,
    model: Any,
    transformers_logits: Callable[..., np.ndarray],
    run: Callable[..., np.ndarray],
    row: np.ndarray,
    level: int,
    tmp_path: Path,
) -> None:
    rounded = copy.deepcopy(model).half().float()
    wanted = transformers_logits(variant, rounded, row, PROMPT)
    got = run(rounded, row, tmp_path / "engine", dtype="float16", optimization_level=level)
    assert root_mean_square(got - wanted) <= tolerance("float16", model.config.num_hidden_layers, wanted)


@pytest.fixture(scope="module", params=QUANTIZED)
def quantized(request: pytest.FixtureRequest, variants: dict[str, Any], tiny_model: Callable[[Any], Any]) -> Any:
    """A variant and its model."""
    return variants[request.param], tiny_model(variants[request.param])


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
def test_integer_weights_give_the_logits_of_their_dequantized_values_at_every_level(
    quantized: Any,
    transformers_logits: Callable[..., np.ndarray],
    run: Callable[..., np.ndarray],
    row: np.ndarray,
    scheme: str,
    tmp_path: Path,
) -> None:
    variant, model = quantized
    layers = model.config.num_hidden_layers
    wanted = transformers_logits(variant, dequantized(model, scheme), row, PROMPT)
    got = [
        run(model, row, tmp_path / f"engine-{level}", quantization=scheme, optimization_level=level)
        for level in (0, 1, 2)
    ]
    allowed = tolerance("int8", layers, wanted)
    assert root_mean_square(got[0] - wanted) <= allowed
    assert root_mean_square(got[1] - got[0]) <= allowed
    assert root_mean_square(got[2] - got[0]) <= allowed
    plain = transformers_logits(variant, model, row, PROMPT)
    if scheme == "W4A16":
        assert root_mean_square(got[0] - plain) > allowed, "the test could not tell quantized weights from others"


def dequantized(model: Any, scheme: str) -> Any:
    """The model with the values that an engine of `scheme` stores: products in blocks, embeddings in float16."""
    import torch

    model = copy.deepcopy(model)
    head = model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for module in model.modules():
        kind = type(module).__name__
        bits = SCHEMES[scheme].head_bits if module is head else SCHEMES[scheme].bits
        if kind in ("Linear", "Conv1D"):
            weight = module.weight.detach().numpy()
            stored = rounded(weight if kind == "Linear" else weight.T, bits, SCHEMES[scheme].block_size)
            module.weight.data = torch.from_numpy(np.ascontiguousarray(stored if kind == "Linear" else stored.T))
        elif kind.endswith("Experts"):
            for experts in (module.gate_up_proj, module.down_proj):
                stored = [rounded(weight, bits, SCHEMES[scheme].block_size) for weight in experts.detach().numpy()]
                experts.data = torch.from_numpy(np.stack(stored))
        elif isinstance(module, torch.nn.Embedding):
            module.weight.data = module.weight.data.half().float()
    return model


def rounded(weight: np.ndarray, bits: int, block_size: int) -> np.ndarray:
    values, scales = quantize_blocks(np.ascontiguousarray(weight), bits, block_size, "float16")
    integers = unpack_int4(values) if bits == 4 else values
    return integers.astype(np.float32) * np.repeat(scales.astype(np.float32), block_size, axis=1)
