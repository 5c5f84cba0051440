"""Finishes network packages on a GPU machine and writes what that took, or why it failed, as JSON.

    python tests/gpu/build_plans.py build/gpu/tiny/*/network build/gpu/SmolLM2-fp16 --json build/gpu/plans.json

Each package NAME/network becomes the engine NAME/engine, any other NAME becomes NAME-engine. Builds run one after the
other in processes of their own, so that peak memory is each build's. The exit status is 0 when all were built.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def engine_path(package: Path) -> Path:
    return package.with_name("engine") if package.name == "network" else package.with_name(f"{package.name}-engine")


def build(package: Path, options: list[str], limit: float) -> dict[str, Any]:
    """The result of one `trtllm-build --from-network`."""
    command = [
        sys.executable, "-m", "trtllm.tools.commands.build", "--from-network", str(package), "--output-dir",
        str(engine_path(package)), "--json", "--quiet", *options,
    ]  # fmt: skip
    begun = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"package": str(package), "built": False, "error": f"took longer than {limit:.0f} s"}
    seconds = round(time.monotonic() - begun, 1)
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        result = {"error": (done.stderr or done.stdout)[-2000:]}
    return {"package": str(package), "built": done.returncode == 0, "process_seconds": seconds, **result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one build")
    parser.add_argument("--option", action="append", default=[], help="of trtllm-build: --option=--no-refittable")
    arguments = parser.parse_args()
    results = []
    for package in arguments.packages:
        results.append(build(package, arguments.option, arguments.limit))
        last = results[-1]
        said = f"{last.get('seconds', 0)} s, {last.get('profiles')} profiles" if last["built"] else last.get("error")
        print(f"{package}: {said}", flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result["built"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
