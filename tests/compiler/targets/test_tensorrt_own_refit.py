"""TensorRT puts other weights into a plan that takes them: whole, in part, adapted, and back. Else it is rebuilt."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from trtllm.compiler.engine import ENGINE, Engine
from trtllm.compiler.pipeline import build_engine
from trtllm.compiler.refit import plan
from trtllm.compiler.refit.refit import RefitOptions, Refitted, refit_engine
from trtllm.config import build_config
from trtllm.errors import BadInputError
from trtllm.progress import Silent


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Plans:
    """Builds and refits with the stand-in, on a machine that has or lacks a GPU."""

    def __init__(self, fake: Any, folder: Path, base: Path) -> None:
        self.fake, self.folder, self.notes = fake, folder, Notes()
        self.engine = self.build(base, "engine")

    def build(self, model: Path, name: str, **options: Any) -> Engine:
        settings = {
            "target": "tensorrt", "tensorrt_version": "8.6", "dtype": "float32", "max_seq_len": 16,
            "max_batch_size": 2, "tensorrt_tokens_per_block": 8, "tensorrt_cache_blocks": 5, **options,
        }  # fmt: skip
        self.fake.feed(self._feed)
        return build_engine(model, self.folder / name, build_config(settings))

    def refit(self, model: Any, name: str, *, engine: Engine | None = None, **options: Any) -> Refitted:
        self.fake.feed(self._feed)
        return refit_engine(
            engine or self.engine, model, self.folder / name, options=RefitOptions(**options), progress=self.notes
        )

    @staticmethod
    def _feed(name: str, run: int) -> np.ndarray:
        if name.startswith("past_") and name != "past_lengths":
            return np.zeros((5, 2, 8, 16), np.float32)
        shapes = {"input_ids": (1 + run, 2 + run), "block_table": (1 + run, 1 + run)}
        return np.ones(shapes.get(name, (1 + run,)), np.int32) * (name != "past_lengths")


def _weights(fake: Any, engine: Engine) -> dict[str, np.ndarray]:
    return fake.weights_of((engine.path / ENGINE).read_bytes())


def _hashes(engine: Engine) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in engine.manifest.weights}


def _same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture
def tuned(synthetic: ModuleType, tmp_path: Path) -> Path:
    synthetic.write_checkpoint(synthetic.PRESETS["tiny"], tmp_path / "tuned", seed=1)
    return tmp_path / "tuned"


@pytest.fixture
def plans(tensorrt_86: Any, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plans:
    monkeypatch.setattr(plan, "device_name", lambda: "Fake GPU 9.0")
    return Plans(tensorrt_86, tmp_path, tiny_checkpoint)


@pytest.fixture
def no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the plan is built again")

    monkeypatch.setattr(plan, "rebuild_plan", refuse)


def test_a_refitted_plan_is_a_fresh_build_and_is_reverted(plans, tuned, tiny_checkpoint, monkeypatch) -> None:
    fresh = plans.build(tuned, "fresh")
    monkeypatch.setattr(plan, "rebuild_plan", None)
    refitted = plans.refit(tuned, "refitted").engine
    assert _same(_weights(plans.fake, refitted), _weights(plans.fake, fresh))
    assert _hashes(refitted) == _hashes(fresh) != _hashes(plans.engine)
    assert refitted.manifest.target == plans.engine.manifest.target
    assert any("TensorRT put" in note and "not built again" in note for note in plans.notes.said)
    reverted = plans.refit(None, "reverted", engine=refitted, revert=True, base=str(tiny_checkpoint)).engine
    assert _hashes(reverted) == _hashes(plans.engine)
    assert _same(_weights(plans.fake, reverted), _weights(plans.fake, plans.engine))


def test_some_tensors_are_put_in_alone(plans, no_builder) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    (entry,) = [entry for entry in plans.engine.manifest.weights if entry.name == name]
    tensor = np.full(entry.shape, 0.25, np.float32)
    refitted = plans.refit({name: tensor}, "partial", partial=True).engine
    before, after = _weights(plans.fake, plans.engine), _weights(plans.fake, refitted)
    assert [key for key in before if not np.array_equal(before[key], after[key])] == [name]
    assert (after[name] == 0.25).all()
    assert {key for key, value in _hashes(refitted).items() if value != _hashes(plans.engine)[key]} == {name}


def test_an_adapter_is_merged_on_its_way_in(plans, tiny_checkpoint, tmp_path, no_builder) -> None:
    from safetensors.numpy import save_file

    random, target = np.random.default_rng(3), "model.layers.0.mlp.down_proj"
    (entry,) = [entry for entry in plans.engine.manifest.weights if entry.name == f"{target}.weight"]
    outputs, inputs = entry.shape
    left = random.normal(size=(outputs, 4)).astype(np.float32)
    right = random.normal(size=(4, inputs)).astype(np.float32)
    (tmp_path / "lora").mkdir()
    prefix = f"base_model.model.{target}"
    tensors = {f"{prefix}.lora_A.weight": right, f"{prefix}.lora_B.weight": left}
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    merged = plans.refit(str(tmp_path / "lora"), "merged", base=str(tiny_checkpoint), strength=0.5).engine
    before, after = (_weights(plans.fake, engine)[f"{target}.weight"] for engine in (plans.engine, merged))
    np.testing.assert_allclose((after - before).reshape(outputs, inputs), 0.5 * 2 * left @ right, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("why", ["gpu", "flag", "version", "folded"])
def test_a_plan_that_cannot_be_refitted_is_built_again_and_a_note_says_why(plans, tuned, monkeypatch, why) -> None:
    engine = plans.engine
    if why == "gpu":
        monkeypatch.setattr(plan, "device_name", lambda: None)
    if why == "flag":
        engine = plans.build(tuned, "fixed", refittable=False)
    if why == "version":
        monkeypatch.setattr(plans.fake, "__version__", "8.6.9")
    fresh = plans.build(tuned, "fresh")
    if why == "folded":
        plans.fake.fold("model.layers.0.mlp.down_proj.weight")
    refitted = plans.refit(tuned, "refitted", engine=engine).engine
    said = {
        "gpu": "on a GPU only", "flag": "--no-refittable", "version": "installed is 8.6.9",
        "folded": "does not take model.layers.0.mlp.down_proj.weight",
    }[why]  # fmt: skip
    assert any("built again" in note and said in note for note in plans.notes.said)
    assert _same(_weights(plans.fake, refitted), _weights(plans.fake, fresh))


def test_some_tensors_cannot_make_a_whole_plan(plans, monkeypatch) -> None:
    monkeypatch.setattr(plan, "device_name", lambda: None)
    (entry,) = [entry for entry in plans.engine.manifest.weights if entry.name == "model.norm.weight"]
    with pytest.raises(BadInputError, match=r"must be built again \(a plan is refitted on a GPU only\)"):
        plans.refit({entry.name: np.ones(entry.shape, np.float32)}, "partial", partial=True)
    assert not (plans.folder / "partial").exists()
