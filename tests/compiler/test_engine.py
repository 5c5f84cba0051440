"""Engine directories: opened when they match their manifest, refused with what does not; written whole or not."""

import json
import shutil
from pathlib import Path

import pytest

from trtllm.compiler.engine import open_engine, writing
from trtllm.compiler.pipeline import build_engine
from trtllm.config import build_config
from trtllm.errors import BadInputError, TargetError, UsageError
from trtllm.runtime.session import open_session


@pytest.fixture(scope="module")
def built(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "tiny"
    build_engine(tiny_checkpoint, folder, build_config({"quantization": "W8A16"}))
    return folder


@pytest.fixture
def engine(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "engine"))


def edit_manifest(engine: Path, **changes: object) -> None:
    path = engine / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_engine_opens(engine):
    opened = open_engine(engine)
    assert opened.target == "onnxruntime"
    assert opened.manifest.files.keys() == {path.name for path in engine.iterdir()} - {"manifest.json"}


def test_every_weight_is_where_the_manifest_says(engine):
    import hashlib

    for entry in open_engine(engine).manifest.weights:
        with (engine / entry.file).open("rb") as file:
            file.seek(entry.offset)
            assert hashlib.sha256(file.read(entry.nbytes)).hexdigest() == entry.sha256, entry.name


def test_a_flipped_bit_is_found_by_its_file(engine):
    path = engine / "rank0.weights"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=r"rank0\.weights has sha256"):
        open_engine(engine)
    open_engine(engine, verify=False)


def test_all_files_that_do_not_match_are_named(engine):
    (engine / "rank0.weights").write_bytes(b"short")
    (engine / "tokenizer.json").unlink()
    with pytest.raises(BadInputError, match=r"rank0\.weights has 5 bytes.*tokenizer\.json is missing"):
        open_engine(engine, verify=False)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "a/b"])
def test_a_manifest_may_not_name_files_outside(engine, name):
    edit_manifest(engine, files={name: {"sha256": "0", "nbytes": 0}})
    with pytest.raises(BadInputError, match="outside the engine directory"):
        open_engine(engine)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"format_version": 1}', "\udcff"])
def test_a_damaged_manifest_is_bad_input(engine, content):
    (engine / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadInputError):
        open_engine(engine)


def test_an_engine_of_another_format_version_says_so(engine):
    edit_manifest(engine, format_version=99)
    with pytest.raises(BadInputError, match="format version 99, this version reads 1"):
        open_engine(engine)


def test_a_folder_without_manifest_is_no_engine(tmp_path):
    with pytest.raises(BadInputError, match=r"no manifest\.json"):
        open_engine(tmp_path)


def test_an_engine_of_a_target_that_is_not_here_is_refused(engine):
    target = json.loads((engine / "manifest.json").read_text())["target"]
    edit_manifest(engine, target=target | {"name": "npu"})
    with pytest.raises(TargetError, match="npu"):
        open_session(open_engine(engine))


def test_an_engine_that_needs_a_newer_library_is_refused(engine):
    target = json.loads((engine / "manifest.json").read_text())["target"]
    edit_manifest(engine, target=target | {"minimum_version": "99.0"})
    with pytest.raises(TargetError, match=r"needs onnxruntime 99\.0 or later"):
        open_session(open_engine(engine))


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fail() -> None:
        with writing(tmp_path / "parent" / "out") as writer:
            writer.write_bytes("a", b"1")
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert list((tmp_path / "parent").iterdir()) == []


def test_an_empty_directory_may_be_taken_and_a_full_one_not(tmp_path):
    (tmp_path / "out").mkdir()
    with writing(tmp_path / "out") as writer:
        writer.write_bytes("a", b"1")
    assert (tmp_path / "out" / "a").read_bytes() == b"1"
    with pytest.raises(UsageError, match="exists"), writing(tmp_path / "out"):
        pass


def test_of_two_writers_of_one_directory_the_slower_is_refused(tmp_path):
    def overtaken() -> None:
        with writing(tmp_path / "out") as slow:
            slow.write_bytes("a", b"slow")
            with writing(tmp_path / "out") as fast:
                fast.write_bytes("a", b"fast")

    with pytest.raises(UsageError, match="exists"):
        overtaken()
    assert (tmp_path / "out" / "a").read_bytes() == b"fast"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dangling_link_at_the_output_is_not_followed(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists"), writing(tmp_path / "out"):
        pass
