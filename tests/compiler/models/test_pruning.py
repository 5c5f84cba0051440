"""Models with fewer heads, channels, layers or weights: transformers loads them, and its logits are our engines'."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trtllm.checkpoints.checkpoint import Checkpoint, FunctionTensor
from trtllm.compiler.pipeline import build_engine
from trtllm.compiler.pruning.measurement import Measurements, measure
from trtllm.compiler.pruning.model import PruningScheme, kept_mask, prune_model
from trtllm.compiler.pruning.rewrite import write_huggingface
from trtllm.config import build_config
from trtllm.errors import UnsupportedModelError, UsageError
from trtllm.frontends.detect import open_model
from trtllm.frontends.fused_experts import EXPERT_NAMES
from trtllm.progress import Silent
from trtllm.runtime.perplexity import scoring_session, window_logits

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


def loaded_logits(variant, folder: Path, tokens: np.ndarray, transformers_logits) -> np.ndarray:
    """Of the model that transformers loads from a directory, in which it finds every tensor that it wants."""
    import transformers

    cls = getattr(transformers, variant.architecture)
    loaded, info = cls.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return transformers_logits(variant, loaded.float().eval(), tokens, len(tokens))


def check_same_logits(variant, folder: Path, out: Path, transformers_logits) -> None:
    """transformers loads every tensor, and its logits are ours to the tolerance of the parity tests."""
    tokens = np.random.default_rng(5).integers(0, 128, 10)
    expected = loaded_logits(variant, folder, tokens, transformers_logits)
    assert np.abs(engine_logits(folder, out, tokens) - expected).max() < 2e-4 * max(1.0, np.abs(expected).max())


def structured(variant, checkpoint: Checkpoint, kind: str) -> PruningScheme:
    """A scheme that takes heads or channels of a tiny model."""
    kv_heads = checkpoint.config.get("num_key_value_heads", 4)
    if kind == "heads-by-groups":
        return PruningScheme(heads=4 // kv_heads if kv_heads > 1 else 2)
    if kind == "heads-evenly":
        return PruningScheme(heads=kv_heads if kv_heads < 4 else 2)
    return PruningScheme(mlp_channels=16 if variant.name.startswith("qwen3-moe") else 64)


def cannot_lose_heads(variant) -> bool:
    return variant.name.startswith(("gpt2", "phi3-longrope"))


def with_zeros_for(pruned: Checkpoint, checkpoint: Checkpoint) -> Checkpoint:
    """The whole model with zeros for what is gone from the matrices that write to the residual stream."""
    tensors = dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        if not name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight", "w2.weight")):
            continue
        is_turned = name.endswith("c_proj.weight")
        whole, kept = (matrix.T if is_turned else matrix for matrix in (tensor.read(), pruned.tensors[name].read()))
        there = {column.tobytes() for column in kept.T}
        mask = np.array([column.tobytes() in there for column in whole.T])
        assert mask.sum() == kept.shape[1]
        zeroed = whole * mask
        zeroed = np.ascontiguousarray(zeroed.T if is_turned else zeroed)
        tensors[name] = FunctionTensor(tensor.spec, lambda start, stop, zeroed=zeroed: zeroed[start:stop])
    return replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("kind", ["heads-by-groups", "heads-evenly", "channels"])
def test_what_is_gone_does_what_zeros_do_in_transformers(
    variant, directory, measured, tmp_path, transformers_logits, kind
):
    """Takes whole query-key-value groups, single query heads of each, or channels, of each expert where there are."""
    if kind.startswith("heads") and cannot_lose_heads(variant):
        pytest.skip("heads of this model are not pruned")
    checkpoint = open_model(directory)
    pruned = prune_model(checkpoint, structured(variant, checkpoint, kind), measured)
    write_huggingface(pruned, tmp_path / "pruned", Silent())
    write_huggingface(with_zeros_for(pruned, checkpoint), tmp_path / "zeroed", Silent())
    tokens = np.random.default_rng(6).integers(0, 128, 10)
    found, expected = (
        loaded_logits(variant, tmp_path / name, tokens, transformers_logits) for name in ("pruned", "zeroed")
    )
    assert np.abs(found - expected).max() < 1e-5 * max(1.0, np.abs(expected).max())  # sums without the zeros
    before = loaded_logits(variant, directory, tokens, transformers_logits)
    assert np.abs(found - before).max() > 1e-3 * np.abs(before).max()


@pytest.mark.parametrize("kind", ["heads-by-groups", "heads-evenly", "channels", "layers", "2:4", "wanda"])
def test_transformers_and_our_engine_agree_on_a_pruned_model(
    variant, directory, measured, tmp_path, transformers_logits, kind
):
    checkpoint = open_model(directory)
    others = {
        "layers": PruningScheme(layers=1),
        "2:4": PruningScheme("magnitude", structure=(2, 4)),
        "wanda": PruningScheme("wanda", 0.5),
    }
    scheme = others.get(kind) or structured(variant, checkpoint, kind)
    refused = kind.startswith("heads") and cannot_lose_heads(variant)
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


def test_the_influence_of_a_layer_is_what_transformers_states_turn_by(variant, model, measured):
    """One less the mean cosine of what goes into a layer and what leaves it, by hooks on the layers themselves."""
    import torch

    if variant.depends_on_length:
        pytest.skip("its tables change with the length that it has seen")
    layers = model.transformer.h if variant.architecture == "GPT2LMHeadModel" else model.model.layers
    cosines = []

    def hook(_, inputs, keywords, output):
        before = (inputs[0] if inputs else keywords["hidden_states"]).double()
        after = (output[0] if isinstance(output, tuple) else output).double()
        cosines.append(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean().item())

    hooks = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        model(torch.tensor(TOKENS))
    for handle in hooks:
        handle.remove()
    assert sorted(measured.similarity) == list(range(len(cosines)))
    influences = [measured.influence(layer) for layer in range(len(cosines))]
    np.testing.assert_allclose(influences, 1 - np.array(cosines), rtol=0, atol=1e-5)  # float32 states
    assert min(influences) > 1e-4


def test_what_goes_into_an_expert_is_measured_on_the_tokens_routed_to_it(variant, model, directory, measured):
    import torch

    if "Mixtral" not in variant.architecture and "Moe" not in variant.architecture:
        pytest.skip("it has no experts")
    calls = {}
    modules = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Experts")}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: calls.__setitem__(name, inputs))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(torch.tensor(TOKENS))
    for handle in hooks:
        handle.remove()
    names = EXPERT_NAMES[variant.architecture]
    compared = 0
    for place, module in modules.items():
        layer = place.rsplit(".", 2)[0]
        states, chosen = calls[place][0].reshape(-1, 64), calls[place][1]
        for expert in range(len(module.gate_up_proj)):
            own = states[(chosen == expert).any(dim=1)]
            gate, up = (own @ module.gate_up_proj[expert].detach().T).chunk(2, dim=-1)
            inner = module.act_fn(gate) * up
            for which, values in (("gate", own), ("up", own), ("down", inner)):
                expected = values.double().square().mean(dim=0) if len(own) else torch.ones(values.shape[1])
                found = measured.squares[names.matrix(layer, expert, which)]
                np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-7)
                compared += 1
        assert names.router(layer) in measured.routers
    assert compared == 3 * sum(len(module.gate_up_proj) for module in modules.values()) > 0


def test_zeros_fall_on_the_experts_and_not_on_the_router(variant, directory, measured):
    names = EXPERT_NAMES.get(variant.architecture)
    if names is None:
        pytest.skip("it has no experts")
    pruned = prune_model(open_model(directory), PruningScheme("wanda", 0.5), measured).tensors
    assert np.count_nonzero(pruned[names.router("model.layers.1")].read() == 0) == 0
    for which in ("gate", "up", "down"):
        matrix = pruned[names.matrix("model.layers.1", 2, which)].read()
        assert np.count_nonzero(matrix == 0) == matrix.size // 2


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
