"""Imports go down only, and each foreign library is known in its own rooms only."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("base", "checkpoints", "frontends", "compiler", "passes", "plugins", "runtime", "tools")

# Module prefix -> floor; the longest prefix counts. A module imports its own floor's room and the floors below.
FLOORS = {
    "trtllm": 0,
    "trtllm.checkpoints": 1,
    "trtllm.compiler.ir": 1,
    "trtllm.plugins": 1,
    "trtllm.frontends": 2,
    "trtllm.passes": 2,
    "trtllm.compiler": 3,  # engine.py, targets/
    "trtllm.compiler.models": 4,
    "trtllm.runtime": 4,
    "trtllm.compiler.pipeline": 5,
    "trtllm.compiler.pruning": 5,  # measures with sessions what it prunes
    "trtllm.compiler.engine_cache": 5,
    "trtllm.compiler.refit": 5,
    "trtllm.compiler.inspection": 5,  # runs engines beside their models
    "trtllm.tools": 6,
}
# Pairs that stand on the same or a lower floor and still do not know each other.
STRANGERS = {
    "trtllm.runtime": ("trtllm.compiler.models", "trtllm.compiler.pipeline", "trtllm.passes", "trtllm.frontends"),
    "trtllm.checkpoints": ("trtllm.compiler.ir", "trtllm.plugins"),
}
# Imports upwards that are wanted, each inside the one function that needs it, so that nobody else pays for it:
DOORS = {
    # LLM("org/model") builds an engine; a machine that only runs engines never opens this door.
    ("trtllm.runtime.opening", "trtllm.compiler.engine_cache"),
    # LLM.refit makes the weights anew before it loads them.
    ("trtllm.runtime.refitting", "trtllm.compiler.refit"),
}
# Foreign library -> the only rooms that import it.
LIBRARY_ROOMS = {
    "onnxruntime": ("trtllm.runtime", "trtllm.compiler.targets.onnxruntime"),
    "tensorrt": ("trtllm.runtime", "trtllm.compiler.targets.tensorrt"),
    "tensorrt_rtx": ("trtllm.runtime", "trtllm.compiler.targets.tensorrt"),
    "transformers": ("trtllm.frontends",),
    "gguf": ("trtllm.frontends",),
    "onnx": ("trtllm.compiler", "trtllm.passes"),
    "onnx_ir": ("trtllm.compiler", "trtllm.passes"),
    "typer": ("trtllm.tools",),
    "rich": ("trtllm.tools",),
    "llguidance": ("trtllm.runtime.guided_decoding",),
}


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "base" else parts
    return ".".join(("trtllm", *parts)).removesuffix(".__init__")


def _imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every absolute import wherever it stands, but for those that only a type checker runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: relative imports hide the room"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno
        else:
            yield from _imports(node)


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _floor(name: str) -> int:
    return FLOORS[max((prefix for prefix in FLOORS if _within(name, prefix)), key=len)]


def _sources() -> list[Path]:
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return sorted(path for path in paths if (ROOT / "tools" / "dev") not in path.parents)


def _faults(name: str, imported: str) -> Iterator[str]:
    if _within(imported, "trtllm"):
        if any(name == room and _within(imported, beyond) for room, beyond in DOORS):
            return
        # The face's names are lazy doors to every floor: a room goes to the module itself.
        if _floor(imported) > _floor(name):
            yield "goes up"
        for room, strangers in STRANGERS.items():
            if _within(name, room) and any(_within(imported, stranger) for stranger in strangers):
                yield "is a stranger's"
        return
    rooms = LIBRARY_ROOMS.get(imported.partition(".")[0])
    if rooms is not None and not any(_within(name, room) for room in rooms):
        yield f"belongs to {', '.join(rooms)}"


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_and_libraries_stay_in_their_rooms(path):
    name = _module_name(path)
    found = [
        f"{path.relative_to(ROOT)}:{line}: import of {imported} {fault}"
        for imported, line in _imports(ast.parse(path.read_text()))
        for fault in _faults(name, imported)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("room", "beyond"), sorted(DOORS))
def test_a_door_is_used_and_stands_inside_a_function(room, beyond):
    tree = ast.parse((ROOT / Path(*room.split(".")[1:])).with_suffix(".py").read_text())
    lines = [line for imported, line in _imports(tree) if _within(imported, beyond)]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert lines
    assert all(any(node.lineno < line <= node.end_lineno for node in functions) for line in lines)


@pytest.mark.parametrize(
    ("name", "imported", "allowed"),
    [
        ("trtllm.runtime.llm", "trtllm.compiler.models.llama", False),
        ("trtllm.runtime.llm", "trtllm.compiler.engine", True),
        ("trtllm.runtime.llm", "trtllm.compiler.engine_cache", False),
        ("trtllm.runtime.opening", "trtllm.compiler.engine_cache.cached_engine", True),
        ("trtllm.runtime.opening", "trtllm.compiler.pipeline", False),
        ("trtllm.checkpoints.recipes", "trtllm.compiler.ir.weights", False),
        ("trtllm.checkpoints.recipes", "onnx", False),
        ("trtllm.passes.fuse", "trtllm.compiler.targets.onnxruntime", False),
        ("trtllm.tools.commands.build", "trtllm.compiler.pipeline", True),
        ("trtllm.errors", "trtllm.checkpoints.recipes", False),
        ("trtllm.compiler.targets.onnxruntime.emit", "onnxruntime", True),
    ],
)
def test_the_rules_tell_good_imports_from_bad(name, imported, allowed):
    assert (not list(_faults(name, imported))) is allowed
