"""Opens a GGUF model that was split into files `NAME-00001-of-00003.gguf` as one."""

from __future__ import annotations

import re
from pathlib import Path

from trtllm.errors import BadInputError
from trtllm.frontends.gguf.container import GgufContainer, GgufTensor, open_container

_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def open_all_splits(path: Path) -> GgufContainer:
    """The model whose file, or one of whose files, is `path`; the metadata are those of the first file."""
    container = open_container(path)
    count = container.metadata.get("split.count", 1)
    if count in (0, 1):
        return container
    match = _SPLIT_NAME.match(path.name)
    if match is None or int(match["count"]) != count:
        raise BadInputError(
            f"{path} is one of {count} files of a model, and its name does not tell the others",
            f"give them back their names, for example MODEL-00001-of-{count:05d}.gguf",
        )
    files = [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise BadInputError(f"{path} is one of {count} files of a model, '{file.name}' is missing", "fetch it too")
    containers = [open_container(file) for file in files]
    return GgufContainer(path, containers[0].metadata, _joined(containers))


def _joined(containers: list[GgufContainer]) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for container in containers:
        for name, tensor in container.tensors.items():
            if name in tensors:
                raise BadInputError(
                    f"tensor '{name}' is in two files, one is {container.path}", "fetch the model again"
                )
            tensors[name] = tensor
    return tensors
