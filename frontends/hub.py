"""Downloads a model from the Hugging Face hub, or takes it from the local cache when the hub cannot be reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.errors import BadInputError, UsageError
from trtllm.frontends.huggingface import read_directory

_ASSETS = ["*.json", "*.txt", "*.model", "*.jinja"]
_NOT_NEEDED = ["onnx/*", "openvino/*", "original/*", "metal/*", "coreml/*", "consolidated*"]
_TIMEOUT_SECONDS = 10
_LOCAL = "pass the directory of a local copy instead"


def read_hub_model(name: str, *, notify: Callable[[str], None]) -> Checkpoint:
    """The model `org/name` or `org/name@revision`.

    Raises BadInputError when it does not exist, is gated, or cannot be reached and is not in the cache.
    """
    repository, _, revision = name.partition("@")
    files = _list_files(repository, revision or None, notify)
    if files is None:
        directory = _from_cache(repository, revision or None)
    else:
        notify(f"downloading {name} from the Hugging Face hub (files in the cache are not fetched again)")
        directory = _download(repository, revision or None, _weight_patterns(repository, files))
    checkpoint = read_directory(directory, source=name)
    return dataclasses.replace(checkpoint, notes=(*checkpoint.notes, f"read from {directory}"))


def _list_files(repository: str, revision: str | None, notify: Callable[[str], None]) -> list[str] | None:
    """Names of the repository's files; None when the hub cannot be reached."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(repository, revision=revision, timeout=_TIMEOUT_SECONDS)
        return [sibling.rfilename for sibling in info.siblings or []]
    except GatedRepoError:
        raise _gated(repository) from None
    except RepositoryNotFoundError:
        raise BadInputError(
            f"there is no path '{repository}', and no model of that name on the Hugging Face hub",
            "check the name; log in with `hf auth login` if the model is private",
        ) from None
    except RevisionNotFoundError:
        raise BadInputError(f"{repository} has no revision '{revision}' on the Hugging Face hub", _LOCAL) from None
    except HFValidationError as error:
        raise BadInputError(f"'{repository}' is neither a path nor a hub id: {error}", "check the path") from None
    except Exception as error:  # offline mode, proxies, timeouts: each HTTP library has its own classes
        notify(f"the Hugging Face hub cannot be reached ({type(error).__name__}); looking in the local cache")
        return None


def _weight_patterns(repository: str, files: list[str]) -> list[str]:
    for suffix in (".safetensors", ".bin"):
        if any(name.endswith(suffix) and "/" not in name for name in files):
            return [*_ASSETS, f"*{suffix}"]
    gguf_files = [name for name in files if name.endswith(".gguf")]
    if gguf_files:
        raise UsageError(
            f"{repository} holds GGUF files only, for example {gguf_files[0]}",
            f"fetch one with `hf download {repository} {gguf_files[0]}` and pass its path",
        )
    raise BadInputError(f"{repository} holds no weights (*.safetensors or *.bin)", "check the name of the model")


def _download(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_NEEDED)
        )
    except GatedRepoError:
        raise _gated(repository) from None
    except Exception as error:  # see _list_files
        raise BadInputError(
            f"the download of {repository} failed: {_first_line(error)}", "run it again to continue, or " + _LOCAL
        ) from None


def _from_cache(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception:  # not in the cache, or the cache is damaged
        raise BadInputError(
            f"there is no path '{repository}'; the Hugging Face hub cannot be reached and its cache lacks the model",
            "check the path or the network; " + _LOCAL,
        ) from None


def _gated(repository: str) -> BadInputError:
    return BadInputError(
        f"{repository} is gated: its owner must grant access",
        "ask for it on the model's page and log in with `hf auth login`, or " + _LOCAL,
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
