"""Models with fewer heads, channels, layers or weights: transformers loads them, and its logits are our engines'."""

import json
from pathlib import Path

import numpy as np
import pytest

from trtllm.compiler.pipeline import build_engine
from trtllm.compiler.pruning.measurement import Measurements, measure
from trtllm.compiler.pruning.model import PruningScheme, kept_mask, prune_model
from trtllm.compiler.pruning.rewrite import write_huggingface
from trtllm.config import build_config
from trtllm.errors import UnsupportedModelError, UsageError
from trtllm.frontends.detect import open_model
from trtllm.progress import Silent
from trtllm.runtime.perplexity import scoring_session, window_logits

MIXTURES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
TOKENS = np.random.default_rng(2).integers(0, 128, (4, 12))


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(directory) -> Measurements:
    return measure(open_model(directory), TOKENS, Silent())


def engine_logits(folder: Path, out: Path, tokens: np.ndarray) -> np.ndarray:
    engine = build_engine(folder, out, build_config({"gather_context_logits": True, "dtype": "float32"}))
    session = scoring_session(engine, len(tokens))
    return np.concatenate([piece.copy() for piece in window_logits(session, tokens)])


def check_same_logits(variant, folder: Path, out: Path, transformers_logits) -> None:
    """transformers loads every tensor, and its logits are ours to the tolerance of the parity tests."""
    import transformers

    cls = getattr(transformers, variant.architecture)
    loaded, info = cls.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = np.random.default_rng(5).integers(0, 128, 10)
    expected = transformers_logits(variant, loaded.float().eval(), tokens, len(tokens))
    assert np.abs(engine_logits(folder, out, tokens) - expected).max() < 2e-4 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("kind", ["heads-by-groups", "heads-evenly", "channels", "layers", "2:4", "wanda"])
def test_transformers_and_our_engine_agree_on_a_pruned_model(
    variant, directory, measured, tmp_path, transformers_logits, kind
):
    checkpoint = open_model(directory)
    kv_heads = checkpoint.config.get("num_key_value_heads", 4)
    scheme = {
        "heads-by-groups": PruningScheme(heads=4 // kv_heads if kv_heads > 1 else 2),
        "heads-evenly": PruningScheme(heads=kv_heads if kv_heads < 4 else 2),
        "channels": PruningScheme(mlp_channels=64),
        "layers": PruningScheme(layers=1),
        "2:4": PruningScheme("magnitude", structure=(2, 4)),
        "wanda": PruningScheme("wanda", 0.5),
    }[kind]
    refused = (kind.startswith("heads") and variant.name.startswith(("gpt2", "phi3-longrope"))) or (
        kind == "channels" and variant.architecture in MIXTURES
    )
    if refused or (kind == "layers" and variant.name == "gpt2-scales"):
        with pytest.raises(UnsupportedModelError):
            prune_model(checkpoint, scheme, measured)
        return
    pruned = prune_model(checkpoint, scheme, measured)
    write_huggingface(pruned, tmp_path / "pruned", Silent())
    if kind in ("heads-by-groups", "heads-evenly", "channels", "layers"):
        assert pruned.nbytes < checkpoint.nbytes
    check_same_logits(variant, tmp_path / "pruned", tmp_path / "engine", transformers_logits)


def test_the_measured_inputs_are_those_of_transformers(variant, model, directory, measured):
    """Mean squares of the inputs of a layer's output projections, against hooks on the model itself."""
    import torch

    if variant.depends_on_length:
        pytest.skip("its tables change with the length that it has seen")
    seen = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(
                name, inputs[0].detach().double().reshape(-1, inputs[0].shape[-1])
            )
        )
        for name, module in model.named_modules()
        if name.endswith(("o_proj", "down_proj", "c_proj"))
    ]
    with torch.no_grad():
        model(torch.tensor(TOKENS))
    for hook in hooks:
        hook.remove()
    compared = 0
    for name, values in seen.items():
        if f"{name}.weight" in measured.squares:
            expected = values.square().mean(dim=0).numpy()
            np.testing.assert_allclose(measured.squares[f"{name}.weight"], expected, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared >= 2
    assert set(measured.similarity) == {0, 1}
    assert all(-1 <= value <= 1 for value in measured.similarity.values())


def test_masks_keep_the_largest():
    score = np.array([[1.0, 4.0, 3.0, 2.0, 8.0, 5.0, 6.0, 7.0]])
    assert kept_mask(score, 0, (2, 4), by_row=True).tolist() == [[False, True, True, False, True, False, False, True]]
    assert score[kept_mask(score, 0.25, None, by_row=True)].min() == 3
    wide = np.concatenate([score, score + 100])
    assert not kept_mask(wide, 0.5, None, by_row=False)[0].any()
    assert kept_mask(wide, 0.5, None, by_row=True).sum(axis=1).tolist() == [4, 4]


@pytest.mark.parametrize(
    "scheme",
    [{"heads": 3}, {"heads": 4}, {"heads": 0}, {"mlp_channels": 96}, {"layers": 2}, {"layers": 0}],
)
def test_numbers_that_do_not_fit_are_refused(variants, tiny_model, tmp_path, scheme):
    tiny_model(variants["llama"]).save_pretrained(tmp_path / "tiny")
    checkpoint = open_model(tmp_path / "tiny")
    with pytest.raises(UsageError, match="cannot stay"):
        prune_model(checkpoint, PruningScheme(**scheme), Measurements())


@pytest.mark.parametrize(
    "scheme",
    [
        {},
        {"method": "wanda", "sparsity": 1.0},
        {"method": "wanda", "structure": (4, 4)},
        {"method": "wanda", "heads": 2},
    ],
)
def test_schemes_without_sense_are_refused(scheme):
    with pytest.raises(UsageError):
        PruningScheme(**scheme)


def test_the_config_says_which_layers_slide_after_some_are_gone(variants, tiny_model, tmp_path):
    tiny_model(variants["gemma2"]).save_pretrained(tmp_path / "tiny")
    found = Measurements(similarity={0: 0.9, 1: 0.1})
    pruned = prune_model(open_model(tmp_path / "tiny"), PruningScheme(layers=1), found)
    write_huggingface(pruned, tmp_path / "pruned", Silent())
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and config["layer_types"] == ["full_attention"]
