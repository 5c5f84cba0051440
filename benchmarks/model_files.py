"""Where the benchmark finds its model and keeps the files made from it."""

import os
from pathlib import Path

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REPOSITORY = Path(__file__).resolve().parent.parent
BENCH_FOLDER = REPOSITORY / "build" / "bench"


def find_gguf(given: str | None = None) -> Path:
    """Return the published GGUF: the given path, else the one in the project's model cache."""
    if given:
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"--gguf {path}: no such file")
        return path
    folder = Path(os.environ.get("TRTLLM_MODELS", "~/.cache/trtllm/models")).expanduser()
    found = sorted(folder.rglob(MODEL_FILE))
    if not found:
        raise FileNotFoundError(
            f"{MODEL_FILE} is not under {folder}; run tools/dev/fetch_models.py or pass --gguf PATH"
        )
    return found[0]


def commit_folder(partial: Path, final: Path) -> None:
    """Rename a finished sibling into place, so that a folder that exists is complete."""
    os.replace(partial, final)
