"""Whatever is wrong with a build's inputs: two lines, the right exit code, no traceback, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trtllm.errors import BadInputError


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def rewrite_tensors(model: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def write_index(model: Path, shard: str) -> None:
    from safetensors.numpy import load_file

    names = list(load_file(model / "model.safetensors"))
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    weight_map = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {names[0]: shard}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# -- the model's files ---------------------------------------------------------------------------------------------


def test_a_truncated_safetensors_file(model, fails):
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    fails(4, model, says=("model.safetensors", "cut short"))


def test_an_index_that_names_a_missing_shard(model, fails):
    write_index(model, "model-00002-of-00002.safetensors")
    fails(4, model, says=("model-00002-of-00002.safetensors",))


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors"])
def test_an_index_that_leaves_its_directory(model, fails, shard):
    write_index(model, shard)
    fails(4, model, says=(shard, "sources you do not trust"))


def test_tensors_missing_unexpected_and_misshapen_are_listed_together(model, fails):
    def change(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        del tensors["model.layers.1.self_attn.q_proj.weight"]
        tensors["model.layers.2.extra.weight"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(65, np.float32)

    rewrite_tensors(model, change)
    fails(
        4,
        model,
        says=(
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.1.self_attn.q_proj.weight",
            "unexpected: model.layers.2.extra.weight",
            "model.norm.weight is 65, config.json implies 64",
        ),
    )


def test_weights_that_are_not_finite_cannot_be_quantized(model, fails):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] = np.full((96, 64), np.nan, np.float32)

    rewrite_tensors(model, change)
    fails(4, model, "-q", "W8A16", says=("model.layers.1.mlp.up_proj.weight", "NaN"))


def test_a_config_that_is_not_json(model, fails):
    (model / "config.json").write_text("{'model_type': llama")
    fails(4, model, says=("config.json", "not JSON"))


def test_a_config_of_an_unknown_architecture(model, fails):
    edit_json(model / "config.json", lambda config: config.update(architectures=["LamaForCausalLM"], model_type="lama"))
    fails(3, model, says=("LamaForCausalLM",))


def test_a_config_of_another_size(model, fails):
    edit_json(model / "config.json", lambda config: config.update(num_hidden_layers=3))
    fails(4, model, says=("missing: model.layers.2.input_layernorm.weight",))


def test_a_truncated_gguf_file(smollm2_gguf, tmp_path, fails):
    path = tmp_path / "short.gguf"
    with smollm2_gguf.open("rb") as whole:
        path.write_bytes(whole.read(8_000_000))
    fails(4, path, says=("short.gguf",))


def test_a_path_where_nothing_is(tmp_path, fails):
    fails(4, tmp_path / "nowhere", says=("nowhere",))


# -- the request ---------------------------------------------------------------------------------------------------


def test_an_unknown_quantization_names_the_nearest(model, fails):
    fails(2, model, "--quantization", "W4A61", says=("W4A61", "W4A16"))


def test_all_unknown_options_are_named_with_the_nearest(model, fails):
    fails(
        2, model, "--max-batchsize", "4", "--strip_plans",
        says=("'--max-batchsize' (did you mean '--max-batch-size'?)", "'--strip-plan'"),
    )  # fmt: skip


def test_a_value_of_the_wrong_type(model, fails):
    fails(2, model, "--max-batch-size", "many", says=("--max-batch-size",))


def test_a_config_file_with_unknown_keys(model, tmp_path, fails):
    (tmp_path / "build.yaml").write_text("max-batch-size: 2\nmax_seqlen: 64\n")
    fails(2, model, "--config", tmp_path / "build.yaml", says=("'max_seqlen' (did you mean 'max_seq_len'?)",))


def test_a_config_file_that_is_no_mapping(model, tmp_path, fails):
    (tmp_path / "build.yaml").write_text("- 1\n")
    fails(2, model, "--config", tmp_path / "build.yaml", says=("build.yaml",))


def test_a_sequence_longer_than_the_model_takes(model, fails):
    fails(2, model, "--max-seq-len", "4096", says=("4096", "128"))


def test_two_models(model, fails):
    fails(2, model, "--checkpoint_dir", "other", says=("two models",))


def test_beams_are_refused_with_a_reason(model, fails):
    fails(2, model, "--max_beam_width", "4", says=("--max-beam-width 4", "one row for each sequence"))


def test_an_unknown_pass_names_the_nearest(model, fails):
    fails(2, model, "--why", "pack-qkw", says=("'pack-qkw' (did you mean 'pack-qkv'?)",))


def test_memory_that_does_not_suffice_is_refused_with_the_numbers(model, fails):
    fails(6, model, "--max-build-memory", "2MB", says=("--max-build-memory allows 2 MB", "needs about"))


def test_a_size_without_sense(model, fails):
    fails(2, model, "--max-build-memory", "much", says=("'much' is no size",))


# -- the place of the engine -----------------------------------------------------------------------------------------


def test_an_output_directory_that_exists(model, tmp_path, run_build):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    ran = run_build(model, "--output-dir", tmp_path / "out", "--quiet")
    assert ran.code == 2
    assert ran.err.splitlines() == [
        f"trtllm-build: {tmp_path / 'out'} exists", "  choose another --output-dir, or remove it first"
    ]  # fmt: skip
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_an_output_parent_that_is_a_file(model, tmp_path, run_build):
    (tmp_path / "file").write_text("")
    ran = run_build(model, "--output-dir", tmp_path / "file" / "out", "--quiet")
    assert ran.code == 2
    assert "cannot write" in ran.err and len(ran.err.splitlines()) == 2


def test_an_output_parent_that_may_not_be_written(model, tmp_path, run_build, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir()
    mkdir = Path.mkdir

    def refuse(path, *arguments, **options):  # root may write anywhere, so permissions alone do not stop it
        if locked in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    ran = run_build(model, "--output-dir", locked / "out", "--quiet")
    assert ran.code == 2
    assert "Permission denied" in ran.err and len(ran.err.splitlines()) == 2


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(model, fails, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")(1000, 900, 100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    fails(6, model, says=("of disk, 100 bytes are free",))


def test_a_disk_that_fills_midway(model, fails, monkeypatch):
    from trtllm.compiler.targets import weights_file

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_file._Output, "_write", no_space)
    fails(6, model, says=("the disk is full",))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(options, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("is_planned", [True, False])
def test_a_real_disk_that_is_too_small(model, small_disk, run_build, monkeypatch, is_planned):
    if not is_planned:  # the plan is wrong, or another process filled the disk meanwhile
        monkeypatch.setattr("trtllm.compiler.pipeline.check_plan", lambda plan: None)
    ran = run_build(model, "--output-dir", small_disk / "out", "--quiet")
    assert ran.code == 6, ran.err
    assert len(ran.err.splitlines()) == 2
    assert list(small_disk.iterdir()) == []


def test_a_file_size_limit_counts_as_a_full_disk(model, tmp_path):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    ran = subprocess.run(command(model, tmp_path / "parent" / "out"), capture_output=True, text=True, preexec_fn=limit)
    assert ran.returncode == 6, ran.stderr
    assert "Traceback" not in ran.stderr
    assert list((tmp_path / "parent").iterdir()) == []


# -- the target ----------------------------------------------------------------------------------------------------


def test_a_missing_onnxruntime(model, fails, monkeypatch):
    from importlib import metadata

    version = metadata.version

    def without_onnxruntime(package):
        if package == "onnxruntime":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without_onnxruntime)
    fails(5, model, says=("needs onnxruntime", "pip install onnxruntime"))


def test_a_missing_tensorrt(model, fails, monkeypatch):
    for library in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr("importlib.metadata.version", _no_package)
    fails(5, model, "--target", "tensorrt", says=("pip install",))


def _no_package(package):
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(package)


def test_an_unexpected_failure_of_a_library_is_called_a_bug_without_traceback(model, fails, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("onnxruntime: [ONNXRuntimeError] : 6\nsecond line")

    monkeypatch.setattr("trtllm.compiler.targets.onnxruntime.emit.write_kept_weights", fail)
    fails(1, model, says=("RuntimeError: onnxruntime", "--log-level debug"))


def test_debug_shows_the_traceback(model, run_build, tmp_path):
    (model / "config.json").write_text("{")
    ran = run_build(model, "--output-dir", tmp_path / "out", "--log-level=debug")
    assert ran.code == 4
    assert "Traceback" in ran.err and BadInputError.__name__ in ran.err


def test_json_errors_stand_alone_on_stdout(model, run_build, tmp_path):
    (model / "config.json").write_text("{")
    for arguments in ((model, "--json"), (model, "--json", "--nonsense")):
        ran = run_build(*arguments, "--output-dir", tmp_path / "out")
        error = json.loads(ran.out)
        assert error.keys() == {"error", "hint", "exit_code"}
        assert error["exit_code"] == ran.code != 0


# -- the end of the process ------------------------------------------------------------------------------------------


def command(model: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "trtllm.tools.commands.build", str(model), "--output-dir", str(output)]


@pytest.fixture
def slow_build(model, tmp_path):
    """A started build that hangs in the middle of its weights."""
    (tmp_path / "slow.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background ignores it\n"
        "from trtllm.checkpoints.evaluation import RecipeReader\n"
        "from trtllm.tools.commands.build import main\n"
        "chunks = RecipeReader.chunks\n"
        "def slowly(reader, recipe):\n"
        "    for chunk in chunks(reader, recipe):\n"
        "        yield chunk\n"
        "        time.sleep(1)\n"
        "RecipeReader.chunks = slowly\n"
        "sys.exit(main())\n"
    )
    parent = tmp_path / "parent"
    arguments = [sys.executable, str(tmp_path / "slow.py"), str(model), "--output-dir", str(parent / "out"), "--quiet"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(parent.glob(".out.partial-*/rank0.weights")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    yield process, parent
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "trtllm-build: interrupted; nothing was left behind"),
        (signal.SIGTERM, 143, "trtllm-build: terminated; nothing was left behind"),
    ],
)
def test_a_build_that_is_stopped_says_so_in_one_line(slow_build, number, code, line):
    process, parent = slow_build
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert err.splitlines() == [line]
    assert list(parent.iterdir()) == []


def test_a_build_that_was_killed_is_swept_by_the_next(slow_build, model, run_build):
    process, parent = slow_build
    process.kill()
    process.wait()
    assert len(list(parent.glob(".out.partial-*"))) == 1
    assert run_build(model, "--output-dir", parent / "out", "--quiet").code == 0
    assert [path.name for path in parent.iterdir()] == ["out"]


def test_the_partial_directory_of_a_build_that_lives_is_left_alone(slow_build, model, run_build):
    _, parent = slow_build
    assert run_build(model, "--output-dir", parent / "out", "--quiet").code == 0
    assert len(list(parent.glob(".out.partial-*"))) == 1
