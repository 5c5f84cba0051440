"""Stripped engines: smaller by what was taken out, refused by the runtime, and whole again to the last byte."""

import hashlib
import shutil
from pathlib import Path

import pytest

from trtllm.checkpoints.selection import Selection
from trtllm.compiler.engine import Engine, open_engine
from trtllm.compiler.pipeline import build_engine
from trtllm.compiler.stripping import (
    EnginePayloads,
    is_stripped,
    kept_offsets,
    restore_engine,
    strip_engine,
    stripped_names,
)
from trtllm.config import build_config
from trtllm.errors import BadInputError, UnsupportedModelError, UsageError
from trtllm.runtime.session import open_session


@pytest.fixture(scope="module", params=[None, "W4A16"], ids=["full", "W4A16"])
def engine(request, tiny_checkpoint, tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("engines") / "tiny"
    return build_engine(tiny_checkpoint, folder, build_config({"quantization": request.param}))


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("everything", [False, True])
def test_stripped_and_restored_is_the_same_engine_to_the_last_byte(engine, tmp_path, everything):
    stripped = strip_engine(engine, tmp_path / "stripped", Selection(everything=everything))
    assert is_stripped(stripped.manifest)
    open_engine(stripped.path, verify=True)
    restored = restore_engine(stripped, tmp_path / "restored", EnginePayloads(engine))
    assert files_of(restored.path) == files_of(engine.path)


def test_everything_stripped_leaves_no_weights_file(engine, tmp_path):
    stripped = strip_engine(engine, tmp_path / "stripped", Selection(everything=True))
    assert not (stripped.path / "rank0.weights").exists()
    assert set(stripped_names(stripped.manifest)) == {entry.name for entry in engine.manifest.weights}
    assert stripped.nbytes < engine.nbytes - engine.manifest.weights_nbytes + 10_000


def test_the_manifest_keeps_what_every_full_weight_is(engine, tmp_path):
    stripped = strip_engine(engine, tmp_path / "stripped", Selection())
    assert stripped.manifest.weights == engine.manifest.weights


def test_kept_weights_are_where_the_layout_says(engine, tmp_path):
    stripped = strip_engine(engine, tmp_path / "stripped", Selection())
    data = (stripped.path / "rank0.weights").read_bytes()
    entries = {entry.name: entry for entry in stripped.manifest.weights}
    offsets = kept_offsets(stripped.manifest)
    assert offsets.keys() == entries.keys() - set(stripped.manifest.stripped)
    for name, offset in offsets.items():
        assert hashlib.sha256(data[offset : offset + entries[name].nbytes]).hexdigest() == entries[name].sha256
        assert offset % 64 == 0


def test_stripping_twice_takes_out_both(engine, tmp_path):
    once = strip_engine(engine, tmp_path / "once", Selection(include=("*layers.0.*",)))
    twice = strip_engine(once, tmp_path / "twice", Selection(include=("*layers.1.*",)))
    assert set(once.manifest.stripped) < set(twice.manifest.stripped)
    restored = restore_engine(twice, tmp_path / "restored", EnginePayloads(engine))
    assert files_of(restored.path) == files_of(engine.path)


def test_a_session_refuses_a_stripped_engine_and_says_what_to_do(engine, tmp_path):
    stripped = strip_engine(engine, tmp_path / "stripped", Selection())
    with pytest.raises(UsageError, match=r"is stripped: .*weights are not in it") as caught:
        open_session(stripped)
    assert "trtllm-refit --engine-dir" in caught.value.hint


def test_other_bytes_are_refused_by_the_names_of_their_weights(engine, tmp_path):
    stripped = strip_engine(engine, tmp_path / "stripped", Selection(everything=True))
    own = EnginePayloads(engine)
    victim = next(entry.name for entry in engine.manifest.weights if len(entry.shape) > 1)

    def altered(entry):
        payload = b"".join(own(entry))
        yield payload[:-1] + bytes([payload[-1] ^ 1]) if entry.name == victim else payload

    with pytest.raises(BadInputError, match="not those that were stripped") as caught:
        restore_engine(stripped, tmp_path / "restored", altered)
    assert caught.value.what.endswith(f": {victim}")
    assert not (tmp_path / "restored").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["stripped"]


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        (Selection(include=("*.nothing.*",)), "no tensor matches"),
        (Selection(exclude=("*.nothing.*",)), "no tensor matches"),
        (Selection(include=("*layers.0.*",), exclude=("*layers.*",)), "no tensor is selected"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(engine, tmp_path, selection, says):
    with pytest.raises(UsageError, match=says):
        strip_engine(engine, tmp_path / "stripped", selection)
    assert not list(tmp_path.iterdir())


def test_an_engine_that_holds_its_weights_inside_its_plan_is_refused(engine, tmp_path):
    folder = Path(shutil.copytree(engine.path, tmp_path / "plan"))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"file": "rank0.weights"', '"file": "rank0.engine"'))
    with pytest.raises(UnsupportedModelError, match="plan holds its weights"):
        strip_engine(open_engine(folder), tmp_path / "stripped", Selection())


def test_a_damaged_kept_file_is_found_when_it_is_opened(engine, tmp_path):
    stripped = strip_engine(engine, tmp_path / "stripped", Selection())
    weights = stripped.path / "rank0.weights"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(BadInputError, match=r"rank0\.weights has"):
        open_engine(stripped.path)
