"""Links the top-level folders into one plain package, build/view/trtllm, for mypy, editors and machines without pip.

Run from anywhere: `python tools/dev/link_view.py`, then put build/view on PYTHONPATH. The folders come from
pyproject.toml's tables, so that those stay the only list. The compiled extension is linked when one is found.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VIEW = ROOT / "build" / "view"
PACKAGE = VIEW / "trtllm"
ROOT_TABLE = "[tool.scikit-build.wheel.force-include]"  # folder -> package, only the package's root
FOLDER_TABLE = "[tool.scikit-build.wheel.packages]"  # package -> folder, the rooms
SKIPPED = {"__pycache__", "native"}


def declared_packages() -> dict[str, str]:
    """Package path -> folder, the root first. Read by hand, in the order written."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    roots = {package: folder for folder, package in _pairs(text, ROOT_TABLE)}
    return roots | dict(_pairs(text, FOLDER_TABLE))


def _pairs(text: str, table: str) -> list[tuple[str, str]]:
    section = text.split(table, 1)[1].split("\n[", 1)[0]
    return re.findall(r'^"([^"]+)"\s*=\s*"([^"]+)"', section, flags=re.MULTILINE)


def find_extension() -> Path | None:
    """The newest extension compiled for this Python: in build/, else in an installed trtllm."""
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    found = [path for path in (ROOT / "build").rglob(f"_native{suffix}") if VIEW not in path.parents]
    if not found:
        spec = importlib.util.find_spec("trtllm")
        places = spec.submodule_search_locations or [] if spec else []
        found = [path for place in places if (path := Path(place) / f"_native{suffix}").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def link_view() -> Path | None:
    """Make build/view anew; return the extension that was linked, or None."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for package, folder in declared_packages().items():
        if package == "trtllm":
            for path in (ROOT / folder).iterdir():
                if path.name not in SKIPPED:
                    (PACKAGE / path.name).symlink_to(path)
        else:
            (VIEW / package).symlink_to(ROOT / folder, target_is_directory=True)
    extension = find_extension()
    if extension is not None:
        (PACKAGE / extension.name).symlink_to(extension)
    return extension


if __name__ == "__main__":
    linked = link_view()
    print(f"{VIEW}: extension {linked.name if linked else 'not found; run `make venv` first'}", file=sys.stderr)
