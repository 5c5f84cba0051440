"""The installed package is the tree, whole and light."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("checkpoints", "frontends", "compiler", "passes", "plugins", "runtime", "tools")
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "tensorrt_rtx", "tensorrt")


def _link_view():
    spec = importlib.util.spec_from_file_location("link_view", ROOT / "tools" / "dev" / "link_view.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _modules_loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return {name.partition(".")[0] for name in result.stdout.split()}


def test_declared_packages_are_the_folders_of_the_tree():
    declared = _link_view().declared_packages()
    assert declared == {"trtllm": "base"} | {f"trtllm/{room}": room for room in ROOMS}
    in_tree = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert in_tree == set(declared.values())


def test_the_root_and_the_tests_are_no_packages():
    assert not (ROOT / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    folders.discard(ROOT / "tools" / "dev")
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_holds_only_a_docstring(room):
    body = ast.parse((ROOT / room / "__init__.py").read_text()).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body, [])) is not None


def test_importing_the_face_loads_no_heavy_library():
    assert _modules_loaded_by("import trtllm").isdisjoint({*HEAVY, "numpy"})


def test_importing_the_runtime_needs_no_build_library():
    if not (ROOT / "runtime" / "llm.py").exists():
        pytest.skip("runtime/llm.py is not there yet")
    loaded = _modules_loaded_by("import trtllm.runtime.llm")
    assert loaded.isdisjoint({"torch", "transformers", "onnx", "onnx_ir", "pydantic", "typer", "llguidance"})


def test_bare_names_are_not_importable_from_elsewhere():
    """A wheel or an editable install must put nothing on the path but `trtllm`."""
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    result = subprocess.run([sys.executable, "-c", code, *ROOMS, "base"], capture_output=True, text=True, cwd="/")
    assert result.stdout.strip() == "[]", result.stderr
