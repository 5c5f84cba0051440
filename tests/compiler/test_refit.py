"""A refit equals a fresh build, byte for byte, for every scheme; what does not fit is said and changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trtllm.compiler.engine import Engine, open_engine
from trtllm.compiler.pipeline import compile as compile_engine
from trtllm.compiler.refit.refit import RefitOptions, prepare_refit, refit_engine
from trtllm.compiler.refit.verification import some_logits
from trtllm.compiler.stripping import strip_engine
from trtllm.compiler.targets.onnxruntime.capabilities import CAPABILITIES
from trtllm.config import BuildConfig
from trtllm.errors import BadInputError, UsageError
from trtllm.quantization import SCHEMES, CalibratedWeightOnly

SCHEME_NAMES = [None, *sorted(name for name in SCHEMES if name in CAPABILITIES.schemes)]


def is_calibrated(name: str | None) -> bool:
    scheme = SCHEMES[name] if name else None
    return isinstance(scheme, CalibratedWeightOnly) or bool(getattr(scheme, "needs_ranges", False))


PLAIN = [name for name in SCHEME_NAMES if not is_calibrated(name)]

MIXED = {"*.mlp.down_proj": "W8A16", "*.self_attn.*": "W4A16"}


@pytest.fixture(scope="module")
def tuned(synthetic: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with other weights."""
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    synthetic.write_checkpoint(synthetic.PRESETS["tiny"], folder, seed=1)
    return folder


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Engine]:
    def made(model: Any, name: str = "engine", **options: Any) -> Engine:
        scheme = options.pop("quantization", None)
        text = str(tmp_path / "text.txt")
        Path(text).write_text("One thing follows from another, and so on to the end. " * 9)
        layers = MIXED if scheme == "MIXED_PRECISION" else {}
        config = BuildConfig(
            quantization=scheme, quantized_layers=layers, calib_dataset=text, calib_size=2, calib_max_seq_length=16
        )
        return compile_engine(
            model, output_dir=tmp_path / name, max_seq_len=32, max_batch_size=2, config=config, **options
        )

    return made


def hashes(engine: Engine) -> dict[str, str]:
    return {entry.name: entry.sha256 for entry in engine.manifest.weights}


def values_of(engine: Engine) -> np.ndarray:
    """All float32 weights by name, one after the other: files of two checkpoints may have them in another order."""
    data = np.fromfile(engine.path / "rank0.weights", np.uint8)
    entries = sorted(engine.manifest.weights, key=lambda entry: entry.name)
    return np.concatenate([data[entry.offset : entry.offset + entry.nbytes].view(np.float32) for entry in entries])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bare(
    source: Path, target: Path, change: Callable[[dict[str, np.ndarray]], Any], config: dict[str, Any] | None = None
) -> Path:
    """A copy of a checkpoint with changed tensors and config."""
    import ml_dtypes  # noqa: F401  numpy learns bfloat16

    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = {name: np.array(value) for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    if config:
        path = target / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scheme", PLAIN)
def test_a_refit_to_a_fine_tune_equals_its_fresh_build_and_reverts(
    tiny_checkpoint: Path, tuned: Path, build: Callable[..., Engine], tmp_path: Path, scheme: str | None, dtype: str
) -> None:
    options: dict[str, Any] = {"quantization": scheme, "dtype": dtype}
    engine = build(tiny_checkpoint, **options)
    fresh = build(tuned, "fresh", **options)
    refitted = refit_engine(engine, tuned)
    assert refitted.engine.path == engine.path.with_name("engine.refit")
    assert refitted.verification is not None
    assert refitted.verification.method == "logits"
    assert refitted.verification.error == 0
    made = open_engine(refitted.engine.path, verify=True)
    assert hashes(made) == hashes(fresh) != hashes(engine)
    for name in ("rank0.weights", "rank0.engine", "recipes.json"):
        assert (made.path / name).read_bytes() == (fresh.path / name).read_bytes()
    back = refit_engine(made, None, tmp_path / "back", options=RefitOptions(base=tiny_checkpoint, revert=True))
    assert hashes(back.engine) == hashes(engine)
    assert (back.engine.path / "recipes.json").read_bytes() == (engine.path / "recipes.json").read_bytes()
    with pytest.raises(BadInputError, match="is not what the engine was built from"):
        refit_engine(made, None, tmp_path / "wrong", options=RefitOptions(base=tuned, revert=True))
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("scheme", PLAIN)
def test_a_checkpoint_of_another_element_type_gives_what_its_own_build_gives(
    tiny_checkpoint: Path, tuned: Path, build: Callable[..., Engine], tmp_path: Path, scheme: str | None, dtype: str
) -> None:
    def widen(tensors: dict[str, np.ndarray]) -> None:
        random = np.random.default_rng(3)
        for name, value in tensors.items():
            tensors[name] = (value.astype(np.float32) + random.normal(0, 1e-4, value.shape)).astype(np.float32)

    wide = bare(tuned, tmp_path / "wide", widen)
    engine = build(tiny_checkpoint, quantization=scheme, dtype=dtype)
    fresh = build(wide, "fresh", quantization=scheme, dtype=dtype)
    refitted = refit_engine(engine, wide)
    assert hashes(refitted.engine) == hashes(fresh)
    again = refit_engine(refitted.engine, tiny_checkpoint, tmp_path / "again")
    assert hashes(again.engine) == hashes(engine)


@pytest.mark.parametrize("scheme", PLAIN)
def test_a_stripped_engine_is_made_whole(
    tiny_checkpoint: Path, tuned: Path, build: Callable[..., Engine], tmp_path: Path, scheme: str | None
) -> None:
    from trtllm.checkpoints.selection import Selection

    engine = build(tiny_checkpoint, quantization=scheme)
    for everything in (True, False):
        selection = Selection(everything=True) if everything else Selection(include=("*norm*",))
        stripped = strip_engine(engine, tmp_path / f"stripped-{everything}", selection)
        assert stripped.manifest.stripped
        whole = refit_engine(stripped, tiny_checkpoint)
        assert not whole.engine.manifest.stripped
        assert (whole.engine.path / "rank0.weights").read_bytes() == (engine.path / "rank0.weights").read_bytes()
        assert hashes(refit_engine(stripped, tuned, tmp_path / f"t{everything}").engine) == hashes(
            build(tuned, f"f{everything}", quantization=scheme)
        )


def test_some_tensors_change_only_the_weights_that_are_made_of_them(
    tiny_checkpoint: Path, tuned: Path, build: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = build(tiny_checkpoint)
    new = load_file(tuned / "model.safetensors")
    qkv = [f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"]
    given = {name: new[name] for name in [*qkv, "model.norm.weight", "model.layers.0.mlp.down_proj.weight"]}
    refitted = refit_engine(engine, given)
    changed = {name for name, digest in hashes(refitted.engine).items() if digest != hashes(engine)[name]}
    assert len(changed) <= 3
    assert set(refitted.report.changed_weights) >= changed
    mixed = bare(tiny_checkpoint, tmp_path / "mixed", lambda tensors: tensors.update(given))
    assert hashes(refitted.engine) == hashes(build(mixed, "fresh"))
    save_file(given, tmp_path / "some.safetensors")
    from_file = refit_engine(engine, tmp_path / "some.safetensors", tmp_path / "from-file")
    assert hashes(from_file.engine) == hashes(refitted.engine)

    lone = {qkv[0]: new[qkv[0]]}
    with pytest.raises(BadInputError, match=r"fused with what is given: .*k_proj") as caught:
        refit_engine(engine, lone, tmp_path / "lone")
    assert "--base" in caught.value.hint
    with_base = refit_engine(engine, lone, tmp_path / "lone", options=RefitOptions(base=tiny_checkpoint))
    single = bare(tiny_checkpoint, tmp_path / "single", lambda tensors: tensors.update(lone))
    assert hashes(with_base.engine) == hashes(build(single, "fresh-single"))


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir()
    save_file(
        {f"base_model.model.{name}": value.astype(np.float32) for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


Q, DOWN, EMBEDDING = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("flavour", ["plain", "rslora", "patterns", "dora"])
def test_an_adapter_gives_what_its_merged_checkpoint_gives(
    tiny_checkpoint: Path, build: Callable[..., Engine], tmp_path: Path, flavour: str, strength: float
) -> None:
    random = np.random.default_rng(5)
    a, b = random.normal(0, 0.1, (4, 64)), random.normal(0, 0.1, (64, 4))
    down_a, down_b = random.normal(0, 0.1, (2, 96)), random.normal(0, 0.1, (64, 2))
    table_a, table_b = random.normal(0, 0.1, (4, 300)), random.normal(0, 0.1, (64, 4))
    magnitude, norm = random.uniform(0.1, 0.3, 64), random.normal(1, 0.1, 64)
    tensors = {
        f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b, f"{DOWN}.lora_A.weight": down_a,
        f"{DOWN}.lora_B.weight": down_b, f"{EMBEDDING}.lora_embedding_A": table_a,
        f"{EMBEDDING}.lora_embedding_B": table_b, "model.norm.weight": norm,
    }  # fmt: skip
    config: dict[str, Any] = {"rank_pattern": {"down_proj": 2}}
    scale = down_scale = 2.0
    down_scale = 4.0
    if flavour == "rslora":
        config["use_rslora"], scale, down_scale = True, 4.0, 8 / np.sqrt(2)
    if flavour == "patterns":
        config["alpha_pattern"], down_scale = {r"layers\.1\.mlp\.down_proj": 6}, 3.0
    if flavour == "dora":
        config["use_dora"] = True
        tensors[f"{Q}.lora_magnitude_vector"] = magnitude
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)

    def merge(weights: dict[str, np.ndarray]) -> None:
        def put(name: str, merged: np.ndarray) -> None:
            base = weights[name].astype(np.float64)
            weights[name] = (base + strength * (merged - base)).astype(np.float32).astype(weights[name].dtype)

        f32 = {name: value.astype(np.float64) for name, value in weights.items()}
        q = f32[f"{Q}.weight"] + scale * (b.astype(np.float32).astype(np.float64) @ a.astype(np.float32))
        if flavour == "dora":
            q = q / np.linalg.norm(q, axis=1, keepdims=True) * magnitude.astype(np.float32)[:, None]
        put(f"{Q}.weight", q)
        put(
            f"{DOWN}.weight",
            f32[f"{DOWN}.weight"]
            + down_scale * (down_b.astype(np.float32).astype(np.float64) @ down_a.astype(np.float32)),
        )
        put(
            f"{EMBEDDING}.weight",
            f32[f"{EMBEDDING}.weight"]
            + scale * (table_b.astype(np.float32).astype(np.float64) @ table_a.astype(np.float32)).T,
        )
        put("model.norm.weight", norm.astype(np.float32).astype(np.float64))

    engine = build(tiny_checkpoint)
    refitted = refit_engine(engine, adapter, options=RefitOptions(base=tiny_checkpoint, strength=strength))
    fresh = build(bare(tiny_checkpoint, tmp_path / "merged", merge), "fresh")
    own, expected, before = (values_of(each) for each in (refitted.engine, fresh, engine))
    # float32 sums against float64 ones, both rounded to bfloat16: a value at the edge may fall one step the other way.
    assert np.abs(own - expected).max() <= 2.0**-7 * np.abs(expected).max()
    assert np.mean(own != expected) < 1e-3
    assert np.mean(own != before) > 0.1
    none = refit_engine(engine, adapter, tmp_path / "none", options=RefitOptions(base=tiny_checkpoint, strength=0.0))
    assert hashes(none.engine) == hashes(engine)


def test_an_adapter_of_another_base_says_everything_that_does_not_fit(
    tiny_checkpoint: Path, build: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = build(tiny_checkpoint)
    tensors = {
        f"{Q}.lora_A.weight": np.ones((4, 128)), f"{Q}.lora_B.weight": np.ones((128, 4)),
        "model.layers.9.mlp.up_proj.lora_A.weight": np.ones((4, 64)),
        "model.layers.9.mlp.up_proj.lora_B.weight": np.ones((96, 4)),
    }  # fmt: skip
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(
        BadInputError, match=r"q_proj is 64x64 in the base, the adapter is of one of 128x128.*layers\.9"
    ):
        refit_engine(engine, adapter, options=RefitOptions(base=tiny_checkpoint))
    with pytest.raises(UsageError, match="merged into its base"):
        refit_engine(engine, adapter)


def test_what_cannot_be_right_is_refused_all_at_once_and_nothing_is_written(
    tiny_checkpoint: Path, tuned: Path, build: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = build(tiny_checkpoint)
    before = content(engine.path)

    def narrow(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:200]
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:200]

    def incomplete(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    def same(tensors: dict[str, np.ndarray]) -> None:
        pass

    other, rotated = {"architectures": ["MistralForCausalLM"]}, {"rope_theta": 77.0, "rope_parameters": None}
    cases: dict[str, tuple[Callable[[dict[str, np.ndarray]], None], dict[str, Any], list[str]]] = {
        "other": (same, other, ["MistralForCausalLM", "LlamaForCausalLM"]),
        "narrow": (narrow, {"vocab_size": 200}, ["has 200 tokens, the engine's 300", "lm_head.weight is 200x64"]),
        "incomplete": (incomplete, {}, ["1 tensors are missing: model.layers.1.mlp.up_proj.weight"]),
        "rotated": (same, rotated, ["its graph is another one", "rope_theta"]),
        "activated": (same, {"hidden_act": "gelu"}, ["hidden_act"]),
    }
    for name, (change, config, words) in cases.items():
        model = bare(tuned, tmp_path / name, change, config)
        with pytest.raises(BadInputError) as caught:
            refit_engine(engine, model, tmp_path / "out")
        for word in words:
            assert word in caught.value.what, name
        assert not (tmp_path / "out").exists()
    assert content(engine.path) == before


def test_a_damaged_recipe_does_not_pass_the_verification(
    tiny_checkpoint: Path, tuned: Path, build: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = build(tiny_checkpoint)
    path = engine.path / "recipes.json"
    text = path.read_text()
    first, second = "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"
    path.write_text(text.replace(first, "X").replace(second, first).replace("X", second))
    with pytest.raises(BadInputError, match="failed its verification"):
        refit_engine(engine, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert refit_engine(engine, tuned, tmp_path / "out", options=RefitOptions(verify=False)).verification is None


def test_in_place_the_engine_is_exchanged_and_nothing_else_is_left(
    tiny_checkpoint: Path, tuned: Path, build: Callable[..., Engine]
) -> None:
    engine = build(tiny_checkpoint)
    refitted = refit_engine(engine, tuned, in_place=True)
    assert refitted.engine.path == engine.path
    assert hashes(open_engine(engine.path)) == hashes(build(tuned, "fresh"))
    assert sorted(path.name for path in engine.path.parent.iterdir()) == ["engine", "fresh", "text.txt"]


def test_an_engine_whose_own_weights_are_damaged_is_not_copied_on(
    tiny_checkpoint: Path, tuned: Path, build: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = build(tiny_checkpoint)
    with (engine.path / "rank0.weights").open("r+b") as file:
        file.seek(4096)
        file.write(b"damage")
    given = {"model.norm.weight": load_file(tuned / "model.safetensors")["model.norm.weight"]}
    with pytest.raises(BadInputError, match="own weights are damaged"):
        refit_engine(engine, given, tmp_path / "out")


_KILLED = """
import os, signal, sys
from trtllm.compiler.refit import refit, verification
from trtllm.compiler.targets import weights_file

where, which = sys.argv[3], int(sys.argv[4])
weights_file._BATCH_BYTES = 0  # every chunk is handed over by itself
calls = 0


def killing(function):
    def counted(*arguments, **options):
        global calls
        calls += 1
        if calls == which:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return counted


owner, name = {
    "writing": (weights_file._Output, "_write"),
    "finishing": (refit.EngineWriter, "write_json"),
    "verifying": (verification, "some_logits"),
    "exchanging": (refit, "_exchange"),
    "clearing": (refit.shutil, "rmtree"),
}[where]
setattr(owner, name, killing(getattr(owner, name)))
refit.refit_engine(sys.argv[1], sys.argv[2], in_place=True)
"""
_POINTS = [
    *(("writing", int(call)) for call in np.random.default_rng(8).integers(1, 16, 5)),
    ("finishing", 1), ("finishing", 4), ("verifying", 1), ("verifying", 2), ("exchanging", 1), ("clearing", 2),
]  # fmt: skip


@pytest.mark.parametrize(("where", "which"), _POINTS)
def test_a_killed_refit_leaves_a_whole_engine_and_the_next_one_cleans_up(
    tiny_checkpoint: Path, tuned: Path, build: Callable[..., Engine], where: str, which: int
) -> None:
    engine = build(tiny_checkpoint)
    before, own = content(engine.path), hashes(engine)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _KILLED, str(engine.path), str(tuned), where, str(which)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    left = open_engine(engine.path, verify=True)
    assert np.isfinite(some_logits(left)).all()
    if where == "clearing":  # the new engine has taken its place, the old one lies beside it
        assert hashes(left) != own
    else:
        assert content(engine.path) == before
    assert len(list(engine.path.parent.iterdir())) == 3
    refit_engine(engine.path, tuned, in_place=True)
    assert sorted(path.name for path in engine.path.parent.iterdir()) == ["engine", "text.txt"]
    assert hashes(open_engine(engine.path, verify=True)) != own


def test_the_report_says_what_would_happen_and_reads_no_payload(
    tiny_checkpoint: Path, tuned: Path, build: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = build(tiny_checkpoint, quantization="W8A16")
    model = bare(tuned, tmp_path / "more", lambda tensors: tensors.update({"extra.weight": np.ones(3, np.float32)}))
    begun = time.monotonic()
    report = prepare_refit(engine, model).report
    assert time.monotonic() - begun < 5
    data = json.loads(json.dumps(report.to_json()))
    assert data["quantization"] == "W8A16"
    assert data["unused"] == ["extra.weight"]
    assert data["changed_weights"] == data["weights"] == len(engine.manifest.weights)
    assert data["problems"] == []
    assert any(line.startswith("unused") for line in report.lines())


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def renumbered(tiny_checkpoint: Path, tuned: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two models whose tokenizers have as many tokens, two of them with each other's number."""
    models = [Path(shutil.copytree(model, tmp_path / name)) for model, name in ((tiny_checkpoint, "a"), (tuned, "b"))]
    for model in models:
        write_tokenizer(model)
    path = models[1] / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(data))
    return models[0], models[1]


def test_another_tokenizer_comes_with_its_weights_and_a_warning(
    renumbered: tuple[Path, Path], build: Callable[..., Engine]
) -> None:
    first, second = renumbered
    engine, fresh = build(first), build(second, "fresh")
    refitted = refit_engine(engine, second)
    (warning,) = (note for note in refitted.report.notes if "WARNING" in note)
    assert "2 of 256 token numbers mean other tokens" in warning
    assert "'B' there and 'A' in the engine" in warning
    assert "the engine takes it with the weights" in warning
    made, expected = (path / "tokenizer.json" for path in (refitted.engine.path, fresh.path))
    assert made.read_bytes() == expected.read_bytes()
    again = refit_engine(refitted.engine, second, engine.path.with_name("again"))
    assert not any("WARNING" in note for note in again.report.notes)


def test_another_tokenizer_is_refused_where_the_engine_would_keep_its_own(
    renumbered: tuple[Path, Path], build: Callable[..., Engine], tmp_path: Path
) -> None:
    first, second = renumbered
    engine = build(first)
    for options in (RefitOptions(partial=True), RefitOptions(keeps_tokenizer=True)):
        with pytest.raises(BadInputError, match="2 of 256 token numbers mean other tokens") as caught:
            refit_engine(engine, second, tmp_path / "out", options=options)
        assert "trtllm-refit" in caught.value.hint
    adapter = write_adapter(
        tmp_path / "adapter", {f"{Q}.lora_A.weight": np.ones((4, 64)), f"{Q}.lora_B.weight": np.ones((64, 4))}
    )
    with pytest.raises(BadInputError, match="the engine keeps its own"):
        refit_engine(engine, adapter, tmp_path / "out", options=RefitOptions(base=second))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_only_cuts_otherwise_or_is_only_written_otherwise_is_no_problem(
    renumbered: tuple[Path, Path], build: Callable[..., Engine], tmp_path: Path
) -> None:
    first, second = renumbered
    engine = build(first)
    data = json.loads((first / "tokenizer.json").read_text())
    (second / "tokenizer.json").write_text(json.dumps(data, indent=7))
    assert not any("tokenizer" in note for note in prepare_refit(engine, second).report.notes)
    data["pre_tokenizer"]["add_prefix_space"] = True
    (second / "tokenizer.json").write_text(json.dumps(data))
    report = prepare_refit(engine, second, options=RefitOptions(keeps_tokenizer=True)).report
    assert not report.problems
    assert any("same numbers, but text is cut into them by other rules" in note for note in report.notes)
