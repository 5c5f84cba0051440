"""Engines of tiny random encoders give the states and embeddings of transformers, whatever the batch around a text."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.quantize import quantize_blocks
from trtllm.compiler.ir.weights import unpack_int4
from trtllm.compiler.models.pooling import Pooling, pooling_of
from trtllm.compiler.pipeline import build_engine
from trtllm.config import build_config
from trtllm.errors import UnsupportedModelError
from trtllm.quantization import SCHEMES
from trtllm.runtime.session import open_session

LAYERS, HIDDEN, PADDING = 2, 64, 1
LENGTHS = np.array([11, 1, 6])
_SIZES = {
    "vocab_size": 128, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 16,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": 128, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 96, "max_position_embeddings": 16,
}  # fmt: skip
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "Bert": _SIZES,
    "Roberta": {**_SIZES, "pad_token_id": PADDING, "type_vocab_size": 1},
    "XLMRoberta": {**_SIZES, "pad_token_id": PADDING, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5},
    "DistilBert": {**_DISTILBERT, "activation": "relu"},
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """The family's base model in float32, every parameter random (norms and biases start constant)."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    transformers = pytest.importorskip("transformers", reason="the reference needs transformers")
    config = getattr(transformers, f"{request.param}Config")(**FAMILIES[request.param])
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    """Three texts of LENGTHS, padded as transformers pads."""
    ids = np.random.default_rng(0).integers(2, 128, (len(LENGTHS), LENGTHS.max()))
    return np.where(np.arange(LENGTHS.max()) < LENGTHS[:, None], ids, PADDING)


def reference(model: Any, tokens: np.ndarray) -> list[np.ndarray]:
    """transformers' states of each text by itself: [length, H]."""
    import torch

    with torch.no_grad():
        return [
            model(torch.tensor(row[None, :length])).last_hidden_state[0].numpy()
            for row, length in zip(tokens, LENGTHS, strict=True)
        ]


def session_of(model: Any, folder: Path, **options: Any) -> Any:
    return open_session(build_engine(model, folder / "engine", build_config(options)), threads=1)


def tolerance(expected: list[np.ndarray]) -> float:
    """Float32 rounding: eps * sqrt(terms) for each of a layer's 7 products in turn, of the largest value."""
    largest = max(float(np.abs(states).max()) for states in expected)
    return float(np.finfo(np.float32).eps) * np.sqrt(HIDDEN) * 7 * LAYERS * largest


@pytest.mark.parametrize("level", [0, 1, 2])
def test_states_of_a_padded_batch_are_those_of_each_text_alone(
    model: Any, tokens: np.ndarray, level: int, tmp_path: Path
) -> None:
    session = session_of(model, tmp_path, pooling="none", optimization_level=level)
    expected = reference(model, tokens)
    batch = session.encode(tokens, LENGTHS)
    assert batch.dtype == np.float32
    for row, length, states in zip(range(len(LENGTHS)), LENGTHS, expected, strict=True):
        assert np.abs(batch[row, :length] - states).max() <= tolerance(expected)
        alone = session.encode(tokens[row : row + 1, :length], LENGTHS[row : row + 1])
        assert np.abs(alone[0] - states).max() <= tolerance(expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_embeddings_are_the_pooled_states(
    model: Any, tokens: np.ndarray, pooling: str, normalize: bool, tmp_path: Path
) -> None:
    session = session_of(model, tmp_path, pooling=pooling, normalize_embeddings=normalize)
    states = reference(model, tokens)
    expected = np.stack([{"mean": s.mean(0), "cls": s[0], "last": s[-1]}[pooling] for s in states])
    allowed = tolerance(states)
    if normalize:
        lengths = np.linalg.norm(expected, axis=1, keepdims=True)
        expected, allowed = expected / lengths, allowed / lengths.min()
    assert np.abs(session.encode(tokens, LENGTHS) - expected).max() <= allowed


def test_float16_differs_by_its_rounding(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    session = session_of(model, tmp_path, dtype="float16", pooling="mean")
    expected = np.stack([states.mean(0) for states in reference(model, tokens)])
    got = session.encode(tokens, LENGTHS)
    assert got.dtype == np.float32
    # Weights and each of some 12 results a layer are rounded by at most eps/2 of themselves, independently.
    allowed = np.finfo(np.float16).eps / 2 * np.sqrt(2 * 12 * LAYERS)
    assert root_mean_square(got - expected) <= allowed * root_mean_square(expected)


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16"])
def test_integer_weights_give_the_embeddings_of_their_dequantized_values(
    model: Any, tokens: np.ndarray, scheme: str, tmp_path: Path
) -> None:
    session = session_of(model, tmp_path, quantization=scheme, pooling="mean")
    expected = [states.mean(0) for states in reference(dequantized(model, scheme), tokens)]
    # Activations stay in float32; a weight's dequantization rounds once more than the reference's.
    assert np.abs(session.encode(tokens, LENGTHS) - expected).max() <= 2 * tolerance(expected)


def root_mean_square(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def dequantized(model: Any, scheme: str) -> Any:
    """The model with the values that an engine of `scheme` stores: products in blocks, words in float16."""
    import torch

    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = torch.from_numpy(rounded(module.weight.detach().numpy(), SCHEMES[scheme].bits))
        elif name.endswith("word_embeddings"):
            module.weight.data = module.weight.data.half().float()
    return model


def rounded(weight: np.ndarray, bits: int) -> np.ndarray:
    values, scales = quantize_blocks(weight, bits, 32, "float16")
    integers = unpack_int4(values) if bits == 4 else values
    return integers.astype(np.float32) * np.repeat(scales.astype(np.float32), 32, axis=1)


def test_positions_that_roberta_keeps_for_padding_do_not_count(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference needs transformers")
    model = transformers.RobertaModel(transformers.RobertaConfig(**FAMILIES["Roberta"]))
    engine = build_engine(model, tmp_path / "engine", build_config({}))
    assert engine.config["model"]["max_positions"] == 14
    assert engine.config["build_config"]["max_seq_len"] == 14


def published(**files: Any) -> Checkpoint:
    names = {"pooling": "1_Pooling/config.json", "modules": "modules.json"}
    assets = {names[key]: json.dumps(value).encode() for key, value in files.items()}
    return Checkpoint("huggingface", "somewhere", "BertModel", {}, {}, assets)


def modules(*names: str) -> list[dict[str, str]]:
    return [{"type": f"sentence_transformers.models.{name}"} for name in names]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Pooling("mean", normalize=False)),
        ({"pooling": {"pooling_mode_cls_token": True}}, Pooling("cls", normalize=False)),
        (
            {
                "pooling": {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True},
                "modules": modules("Transformer", "Pooling", "Normalize"),
            },
            Pooling("mean", normalize=True),
        ),
        ({"pooling": {"pooling_mode": "lasttoken"}, "modules": modules("Pooling")}, Pooling("last", normalize=False)),
    ],
)
def test_pooling_is_what_the_model_was_published_with(files: dict[str, Any], expected: Pooling) -> None:
    assert pooling_of(published(**files), build_config({})) == expected


def test_the_build_overrides_what_was_published() -> None:
    checkpoint = published(pooling={"pooling_mode_cls_token": True}, modules=modules("Transformer", "Normalize"))
    build = build_config({"pooling": "last", "normalize_embeddings": False})
    assert pooling_of(checkpoint, build) == Pooling("last", normalize=False)
    assert pooling_of(checkpoint, build_config({"pooling": "last"})) == Pooling("last", normalize=True)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"pooling": {"pooling_mode_max_tokens": True}}, "max"),
        ({"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}}, "cls \\+ mean"),
        ({"modules": modules("Transformer", "Pooling", "Dense")}, "Dense"),
    ],
)
def test_what_has_no_form_here_is_refused_by_name(files: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        pooling_of(published(**files), build_config({}))
