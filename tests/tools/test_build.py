"""trtllm-build when all is well: what it makes, what it prints, and that --help is quick."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from trtllm.compiler.engine import open_engine
from trtllm.config import BuildConfig
from trtllm.tools.build_request import BUILD_FIELDS
from trtllm.tools.commands.build import app


def test_an_engine_is_built_and_the_next_step_shown(tiny_checkpoint, tmp_path, run_build):
    ran = run_build(tiny_checkpoint, "--output_dir", tmp_path / "out", "--max_batch_size=2", "-q", "W8A16", "-O1")
    assert ran.code == 0
    build = open_engine(tmp_path / "out").config["build_config"]
    assert (build["max_batch_size"], build["quantization"], build["optimization_level"]) == (2, "W8A16", 1)
    assert ran.out.startswith(f"built {tmp_path / 'out'}: LlamaForCausalLM, onnxruntime float32 W8A16")
    assert "from trtllm import LLM" in ran.out
    assert "reading the model" in ran.err and "running passes" in ran.err


def test_quiet_says_nothing(tiny_checkpoint, tmp_path, run_build):
    ran = run_build(tiny_checkpoint, "--output-dir", tmp_path / "out", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_json_is_the_only_thing_on_stdout(tiny_checkpoint, tmp_path, run_build):
    ran = run_build(tiny_checkpoint, "--output-dir", tmp_path / "out", "--json", "--why", "quantize-weights")
    result = json.loads(ran.out)
    assert result["built"] is True
    assert result["engine_bytes"] == open_engine(tmp_path / "out").nbytes
    assert result["plan"]["architecture"] == "LlamaForCausalLM"
    assert result["why"] == []


@pytest.mark.parametrize("flag", ["--dry-run", "--plan"])
def test_a_build_that_is_not_meant_writes_nothing(tiny_checkpoint, tmp_path, run_build, flag):
    ran = run_build(tiny_checkpoint, "--output-dir", tmp_path / "out", flag, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["built"] is False
    assert not (tmp_path / "out").exists()


def test_the_plan_names_what_will_happen(tiny_checkpoint, tmp_path, run_build):
    ran = run_build(tiny_checkpoint, "--output-dir", tmp_path / "out", "--plan", "-q", "W4A16")
    for word in ("pack-qkv 2", "native", "cache", "build memory", "disk"):
        assert word in ran.out


def test_a_plan_that_does_not_fit_is_shown_and_refused(tiny_checkpoint, tmp_path, run_build):
    ran = run_build(tiny_checkpoint, "--output-dir", tmp_path / "out", "--plan", "--max-build-memory", "1MB")
    assert ran.code == 6
    assert "DOES NOT FIT" in ran.out


def test_the_command_line_overrides_the_file(tiny_checkpoint, tmp_path, run_build):
    (tmp_path / "build.yaml").write_text("max-batch-size: 2\nmax_seq_len: 32\nquantization: W8A16\ngemm_plugin: auto\n")
    arguments = ("--config", tmp_path / "build.yaml", "--max-seq-len", "48", "-q", "none")
    ran = run_build(tiny_checkpoint, "--output-dir", tmp_path / "out", *arguments)
    build = open_engine(tmp_path / "out").config["build_config"]
    assert (build["max_batch_size"], build["max_seq_len"], build["quantization"]) == (2, 48, None)
    assert "gemm_plugin auto has no effect here" in ran.err


def test_stages_can_be_dumped_drawn_and_asked(tiny_checkpoint, tmp_path, run_build):
    ran = run_build(
        tiny_checkpoint, "--output-dir", tmp_path / "out", "--dry-run", "--dump", tmp_path / "dump",
        "--visualize_network", tmp_path / "drawn", "--why", "fold-constants", "--monitor-memory",
    )  # fmt: skip
    assert (tmp_path / "dump" / "00-model.onnxtxt").exists()
    assert (tmp_path / "drawn" / "network.onnx").exists()
    assert "fold-constants left" in ran.out
    assert "peak memory after reading the model" in ran.err


def test_the_same_build_twice_gives_the_same_bytes(tiny_checkpoint, tmp_path, run_build):
    for name in ("a", "b"):
        run_build(tiny_checkpoint, "--output-dir", tmp_path / name, "-q", "W4A16")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_defaults_in_the_help_are_those_of_the_config():
    shown = {parameter.name: parameter.show_default for parameter in typer.main.get_command(app).params}
    assert set(BUILD_FIELDS) == set(BuildConfig.model_fields)
    for name, field in BuildConfig.model_fields.items():
        if (
            isinstance(shown[name], str)
            and isinstance(field.default, (int, str))
            and not isinstance(field.default, bool)
        ):
            assert shown[name] == str(field.default)


def test_help_names_exit_codes():
    ran = subprocess.run(
        [sys.executable, "-m", "trtllm.tools.commands.build", "--help"], capture_output=True, text=True
    )
    assert ran.returncode == 0
    assert "Exit codes" in ran.stdout and "--max-batch-size" in ran.stdout


def test_help_loads_no_heavy_library():
    script = (
        "import sys; from trtllm.tools.commands.build import main; main(['--help']);"
        "print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stderr
    for library in ("numpy", "onnx", "onnx_ir", "pydantic", "rich", "torch", "transformers", "yaml"):
        assert f"'{library}'" not in loaded


def test_the_command_is_declared():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'trtllm-build = "trtllm.tools.commands.build:main"' in text


def test_every_option_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()
    for parameter in typer.main.get_command(app).params:
        for name in [*parameter.opts, *parameter.secondary_opts]:
            if name.startswith("--"):
                assert f"`{name}" in text, name
