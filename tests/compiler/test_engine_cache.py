"""An engine that was built is found again, by what it is made of; none is lost that somebody uses."""

import gc
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from trtllm.compiler import engine_cache
from trtllm.compiler.engine import Engine
from trtllm.compiler.engine_cache import cached_engine
from trtllm.config import BuildConfig

BUILD = BuildConfig(max_seq_len=64, max_batch_size=2)


class Notes:
    """A Progress that keeps what it is told."""

    OUTCOMES = {"engine built in": "built", "engine refitted in": "refitted", "engine from the cache": "found"}  # noqa: RUF012

    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, name: str, total: int | None = None) -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def outcome(self) -> str:
        told = [note for note in self.notes if note.startswith(tuple(self.OUTCOMES))]
        assert len(told) == 1
        return next(outcome for words, outcome in self.OUTCOMES.items() if told[0].startswith(words))


def get(model: Any, root: Path, build: BuildConfig = BUILD, **options: Any) -> tuple[Engine, str]:
    notes = Notes()
    engine = cached_engine(model, build, cache_root=root, progress=notes, **options)
    return engine, notes.outcome


def records(root: Path) -> set[str]:
    return {path.parent.name for path in root.glob("*/used")}


def test_the_second_time_an_engine_is_found(tiny_checkpoint: Path, tmp_path: Path) -> None:
    first, how_first = get(tiny_checkpoint, tmp_path)
    second, how_second = get(tiny_checkpoint, tmp_path)
    assert (how_first, how_second) == ("built", "found")
    assert first.path == second.path


def test_another_build_or_other_weights_or_another_tokenizer_are_another_engine(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    root = tmp_path / "cache"
    assert get(model, root)[1] == "built"
    assert get(model, root, BuildConfig(max_seq_len=32, max_batch_size=2))[1] == "built"
    weights = next(model.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert get(model, root)[1] == "refitted"
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert get(model, root)[1] == "refitted"
    assert get(model, root)[1] == "found"
    assert len(records(root)) == 4


def test_a_copy_of_a_model_finds_the_same_engine(tiny_checkpoint: Path, tmp_path: Path) -> None:
    get(tiny_checkpoint, tmp_path / "cache")
    shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    assert get(tmp_path / "copy", tmp_path / "cache")[1] == "found"


def test_weights_are_read_once_unless_the_file_changes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    weights = next(model.glob("*.safetensors"))
    os.utime(weights, (1e9, 1e9))
    get(model, tmp_path / "cache")
    hashed: list[Path] = []
    original = engine_cache.file_sha256
    monkeypatch.setattr(engine_cache, "file_sha256", lambda path: hashed.append(path) or original(path))
    get(model, tmp_path / "cache")
    assert weights.resolve() not in hashed
    os.utime(weights, (1e9 + 1, 1e9 + 1))
    get(model, tmp_path / "cache")
    assert hashed.count(weights.resolve()) == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_engine_is_built_again(tiny_checkpoint: Path, tmp_path: Path, damage: str) -> None:
    engine, _ = get(tiny_checkpoint, tmp_path)
    weights = engine.path / "rank0.weights"
    if damage == "remove":
        (engine.path / "manifest.json").unlink()
    else:
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content[:-1] if damage == "truncate" else content)
    assert get(tiny_checkpoint, tmp_path)[1] == "built"
    assert get(tiny_checkpoint, tmp_path)[1] == "found"


def test_the_least_recently_used_engines_go_first_but_none_in_use(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def build(length: int) -> Engine:
        return get(tiny_checkpoint, tmp_path, BuildConfig(max_seq_len=length), max_records=2)[0]

    held = build(16)
    names = [held.path.parent.name]
    for length in (17, 18, 19):
        names.append(build(length).path.parent.name)
        gc.collect()
    assert records(tmp_path) == {names[0], names[3]}
    assert held.path.is_dir()
    del held
    gc.collect()
    names.append(build(20).path.parent.name)
    assert records(tmp_path) == {names[3], names[4]}


def test_storage_is_bounded_but_the_newest_engine_stays(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for length in (16, 17):
        engine, _ = get(tiny_checkpoint, tmp_path, BuildConfig(max_seq_len=length), max_cache_storage_gb=1e-9)
        name = engine.path.parent.name
        del engine
        gc.collect()
        assert records(tmp_path) == {name}


def _in_process(model: Path, root: Path, results: Any) -> None:
    engine, how = get(model, root)
    results.put((how, str(engine.path)))


def test_processes_that_want_the_same_engine_at_once_build_it_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_in_process, args=(tiny_checkpoint, tmp_path, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert sorted(how for how, _ in outcomes) == ["built", "found", "found"]
    assert len({path for _, path in outcomes}) == 1


def test_a_build_that_fails_leaves_no_record(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Engine:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_cache, "finish_build", failing)
    with pytest.raises(KeyboardInterrupt):
        get(tiny_checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    assert get(tiny_checkpoint, tmp_path)[1] == "built"


def test_a_model_in_memory_is_known_by_its_weights(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="a model in memory needs torch")
    transformers = pytest.importorskip("transformers", reason="a model in memory needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    assert get(model, tmp_path)[1] == "built"
    assert get(model, tmp_path)[1] == "found"
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert get(model, tmp_path)[1] == "refitted"


def test_a_refitted_record_is_the_engine_that_a_build_makes(
    tiny_checkpoint: Path, synthetic: Any, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    synthetic.write_checkpoint(synthetic.PRESETS["tiny"], tuned, seed=1)
    (tuned / "generation_config.json").write_text('{"eos_token_id": 3}')
    get(tiny_checkpoint, tmp_path / "cache")
    refitted, how = get(tuned, tmp_path / "cache")
    built, how_alone = get(tuned, tmp_path / "alone")
    assert (how, how_alone) == ("refitted", "built")
    names = sorted(path.name for path in built.path.iterdir())
    assert sorted(path.name for path in refitted.path.iterdir()) == names
    for name in names:
        assert (refitted.path / name).read_bytes() == (built.path / name).read_bytes(), name
    assert get(tuned, tmp_path / "cache")[1] == "found"
