"""A machine that only runs engines: numpy, onnxruntime, tokenizers and this package, and nothing else."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = ("numpy", "onnxruntime", "tokenizers")
# What onnxruntime and tokenizers import from their own declared requirements.
CARRIED = ("flatbuffers", "packaging", "protobuf", "sympy", "mpmath", "coloredlogs", "humanfriendly")
PROGRAM = """
import importlib.util, sys
absent = ("torch", "transformers", "onnx", "onnx_ir", "jinja2", "pydantic", "typer", "safetensors", "huggingface_hub")
found = [name for name in absent if importlib.util.find_spec(name)]
assert not found, found
from trtllm import LLM, SamplingParams
with LLM(sys.argv[1], threads=1) as llm:
    output = llm.generate("hello", SamplingParams(max_tokens=8, ignore_eos=True))
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    streamed = [each.outputs[0].text_diff for each in llm.stream("hello", params)]
    assert "".join(streamed) == output.outputs[0].text
    print(output.outputs[0].token_ids)
"""


def link_distribution(name: str, folder: Path) -> None:
    """Links the top-level files and folders of an installed distribution, so that nothing is fetched."""
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        return
    for top in {Path(file).parts[0] for file in files if not str(file).startswith("..")}:
        source = Path(sysconfig.get_path("purelib")) / top
        if source.exists() and top != "__pycache__" and not (folder / top).exists():
            (folder / top).symlink_to(source)


def link_package(folder: Path) -> None:
    """Links this package as its wheel lays it out."""
    package = folder / "trtllm"
    package.mkdir()
    for path in (ROOT / "base").iterdir():
        if path.name not in ("native", "__pycache__"):
            (package / path.name).symlink_to(path)
    for room in ("checkpoints", "frontends", "compiler", "passes", "plugins", "runtime", "tools"):
        (package / room).symlink_to(ROOT / room)
    spec = importlib.util.find_spec("trtllm._native")
    assert spec is not None
    assert spec.origin is not None
    for library in Path(spec.origin).parent.glob("*.so"):
        (package / library.name).symlink_to(library)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image")
    for name in (*ALLOWED, *CARRIED):
        link_distribution(name, folder)
    link_package(folder)
    return folder


def test_an_engine_runs_where_only_its_library_and_a_tokenizer_are_installed(
    image: Path, tiny_llama_engine: Path
) -> None:
    from trtllm import LLM, SamplingParams

    command = [sys.executable, "-S", "-c", PROGRAM, str(tiny_llama_engine)]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(image), "HOME": str(image)}
    )
    assert finished.returncode == 0, finished.stderr
    with LLM(tiny_llama_engine, threads=1) as llm:
        here = llm.generate("hello", SamplingParams(max_tokens=8, ignore_eos=True))
    assert finished.stdout.strip() == str(here.outputs[0].token_ids)
