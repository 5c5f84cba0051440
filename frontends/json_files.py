"""Reads JSON files of a model with errors that name the file, the line and the column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trtllm.errors import BadInputError


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises BadInputError when it cannot be read, is not JSON, or is not an object."""
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8: byte {error.start} is invalid", "fetch the file again") from None
    except json.JSONDecodeError as error:
        raise BadInputError(
            f"{path} is not JSON: {error.msg} at line {error.lineno} column {error.colno}", _repair(path)
        ) from None
    except RecursionError:
        raise BadInputError(f"{path} is nested too deeply to be read", "fetch the file again") from None
    if not isinstance(data, dict):
        raise BadInputError(f"{path} holds a JSON {type(data).__name__}, expected an object", "fetch the file again")
    return data


def _repair(path: Path) -> str:
    is_pointer = path.stat().st_size < 1000 and path.read_bytes().startswith(b"version https://git-lfs")
    return "it is a Git LFS pointer: run `git lfs pull`" if is_pointer else "repair it or fetch the file again"
