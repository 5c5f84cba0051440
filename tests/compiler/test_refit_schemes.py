"""For every scheme: pruned and refitted is the engine that it was, refitted to a fine-tune is its fresh build, to the
last weight and the last token.

Schemes come from the table: a new one is covered as soon as it is in it and the target runs it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trtllm import LLM, SamplingParams
from trtllm.checkpoints.selection import Selection
from trtllm.compiler.calibration import kept
from trtllm.compiler.engine import Engine, open_engine
from trtllm.compiler.pipeline import compile as compile_engine
from trtllm.compiler.refit.recipes import is_calibrated, is_measured, stored_recipes
from trtllm.compiler.refit.refit import RefitOptions, refit_engine
from trtllm.compiler.stripping import strip_engine
from trtllm.compiler.targets.onnxruntime.capabilities import CAPABILITIES
from trtllm.config import BuildConfig
from trtllm.errors import BadInputError
from trtllm.quantization import SCHEMES, MixedPrecision

SCHEME_NAMES = [None, *sorted(name for name in SCHEMES if name in CAPABILITIES.schemes)]
CALIBRATING, MEASURING = "W4A16_AWQ", "FP8"
MIXED = {"*.mlp.down_proj": "W8A16", "*.self_attn.*": "W4A16"}
TEXT = "One thing follows from another, and so on to the end. " * 9
TOKENS = SamplingParams(max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def models(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny checkpoint and a fine-tune of it: every weight is perturbed by a fifth of itself."""
    folder = tmp_path_factory.mktemp("models")
    base, tuned = folder / "base", folder / "tuned"
    synthetic.write_checkpoint(synthetic.PRESETS["tiny"], base)
    write_tokenizer(base)
    shutil.copytree(base, tuned)
    random = np.random.default_rng(17)
    tensors = load_file(tuned / "model.safetensors")
    perturbed = {
        name: (value.astype(np.float32) * (1 + 0.2 * random.standard_normal(value.shape))).astype(value.dtype)
        for name, value in tensors.items()
    }
    save_file(perturbed, tuned / "model.safetensors", {"format": "pt"})
    return base, tuned


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Engine]:
    def made(model: Path, name: str, scheme: str | None) -> Engine:
        text = tmp_path / "text.txt"
        if not text.exists():
            text.write_text(TEXT)
        config = BuildConfig(
            quantization=scheme,
            quantized_layers=MIXED if scheme and isinstance(SCHEMES[scheme], MixedPrecision) else {},
            calib_dataset=str(text), calib_size=2, calib_max_seq_length=16,
        )  # fmt: skip
        return compile_engine(model, output_dir=tmp_path / name, max_seq_len=48, max_batch_size=2, config=config)

    return made


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def hashes(engine: Engine) -> dict[str, str]:
    """sha256 of every weight, which the file is checked to hold."""
    return {entry.name: entry.sha256 for entry in open_engine(engine.path, verify=True).manifest.weights}


def tokens(engine: Engine) -> list[list[int]]:
    """What the engine generates from a few prompts."""
    random = np.random.default_rng(2)
    prompts = [random.integers(0, 250, length).tolist() for length in (1, 7, 20)]
    with LLM(engine.path, threads=1) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, TOKENS)]


def chosen(engine: Engine) -> bool:
    """Whether calibration had a part in the engine's weights."""
    return any(is_calibrated(recipe) or is_measured(recipe) for recipe in stored_recipes(engine).values())


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_pruned_then_refitted_is_the_same_engine(
    models: tuple[Path, Path], build: Callable[..., Engine], tmp_path: Path, scheme: str | None
) -> None:
    engine = build(models[0], "engine", scheme)
    stripped = strip_engine(engine, tmp_path / "stripped", Selection(everything=True))
    assert not (stripped.path / "rank0.weights").exists()
    by_calibration = any(map(is_calibrated, stored_recipes(engine).values()))
    options = RefitOptions(recalibrate=by_calibration)  # measured ranges are replayed
    restored = refit_engine(stripped, models[0], options=options).engine
    assert hashes(restored) == hashes(engine)
    assert (restored.path / "rank0.weights").read_bytes() == (engine.path / "rank0.weights").read_bytes()
    assert tokens(restored) == tokens(engine)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_refitted_to_a_fine_tune_is_its_fresh_build(
    models: tuple[Path, Path], build: Callable[..., Engine], tmp_path: Path, scheme: str | None
) -> None:
    engine, fresh = build(models[0], "engine", scheme), build(models[1], "fresh", scheme)
    refitted = refit_engine(engine, models[1], options=RefitOptions(recalibrate=chosen(engine)))
    assert refitted.verification is not None
    assert refitted.verification.method == "logits"
    assert hashes(refitted.engine) == hashes(fresh)
    expected = tokens(fresh)
    assert tokens(refitted.engine) == expected != tokens(engine)
    again = refit_engine(
        refitted.engine, models[0], tmp_path / "again", options=RefitOptions(recalibrate=chosen(engine))
    )
    assert hashes(again.engine) == hashes(engine)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_without_calibration_ranges_are_replayed_and_chosen_integers_refused(
    models: tuple[Path, Path], build: Callable[..., Engine], tmp_path: Path, scheme: str | None
) -> None:
    engine = build(models[0], "engine", scheme)
    recipes = stored_recipes(engine)
    if not chosen(engine):
        pytest.skip("the scheme needs the weights alone")
    if any(map(is_calibrated, recipes.values())):
        with pytest.raises(BadInputError, match="chosen by calibration") as caught:
            refit_engine(engine, models[1])
        assert "--recalibrate" in caught.value.hint
        return
    fresh = build(models[1], "fresh", scheme)
    replayed = refit_engine(engine, models[1], tmp_path / "replayed")
    assert any("--recalibrate" in note for note in replayed.report.notes)
    free = [name for name, recipe in recipes.items() if not is_measured(recipe)]
    assert free
    assert [hashes(replayed.engine)[name] for name in free] == [hashes(fresh)[name] for name in free]
    assert tokens(replayed.engine) != tokens(engine)
    back = refit_engine(replayed.engine, models[0], tmp_path / "back")
    assert hashes(back.engine) == hashes(engine) != hashes(replayed.engine)
    assert tokens(back.engine) == tokens(engine)


@pytest.mark.parametrize("scheme", [CALIBRATING, MEASURING])
def test_calibration_goes_by_the_tokens_of_the_build_whatever_became_of_its_text(
    models: tuple[Path, Path], build: Callable[..., Engine], tmp_path: Path, scheme: str
) -> None:
    engine, fresh = build(models[0], "engine", scheme), build(models[1], "fresh", scheme)
    (tmp_path / "text.txt").write_text("Something else altogether, 1 2 3 4 5 6 7 8 9! " * 20)
    other = build(models[1], "other", scheme)
    assert hashes(other) != hashes(fresh)
    refitted = refit_engine(engine, models[1], options=RefitOptions(recalibrate=True)).engine
    assert hashes(refitted) == hashes(fresh)
    for name in kept.FILES:
        assert (refitted.path / name).read_bytes() == (engine.path / name).read_bytes()
    (tmp_path / "text.txt").unlink()
    assert hashes(
        refit_engine(refitted, models[0], tmp_path / "back", options=RefitOptions(recalibrate=True)).engine
    ) == (hashes(engine))


@pytest.mark.parametrize("scheme", [CALIBRATING, MEASURING])
def test_of_a_long_text_the_hash_is_kept_and_another_text_refused(
    models: tuple[Path, Path],
    build: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    monkeypatch.setattr(kept, "LARGEST_KEPT", 1)
    engine, fresh = build(models[0], "engine", scheme), build(models[1], "fresh", scheme)
    assert not (engine.path / kept.TOKENS).exists()
    record = json.loads((engine.path / kept.RECORD).read_text())
    assert (record["rows"], record["length"]) == (2, 16)
    options = RefitOptions(recalibrate=True)
    assert hashes(refit_engine(engine, models[1], options=options).engine) == hashes(fresh)
    (tmp_path / "text.txt").write_text("Something else altogether. " * 20)
    with pytest.raises(BadInputError, match=r"text.txt does not give the 2 x 16 tokens") as caught:
        refit_engine(engine, models[1], tmp_path / "other", options=options)
    assert "put the text back" in caught.value.hint
    assert not (tmp_path / "other").exists()
