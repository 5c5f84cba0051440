"""Writes a legalized network as an ONNX model with its weights in a file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.compiler.engine import ENGINE, WEIGHTS, EngineWriter, TargetEntry
from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.text import to_proto_without_weights
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.targets.emitted import Emitted
from trtllm.compiler.targets.weights_file import in_file_order, layout, write_kept_weights
from trtllm.config import BuildConfig
from trtllm.errors import TargetError
from trtllm.progress import Progress

MINIMUM_VERSION = "1.24"
"""The first onnxruntime with opset 24 and the operators of the capability table."""


def library_version() -> str:
    """The installed onnxruntime. Raises TargetError when there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("onnxruntime")
    except PackageNotFoundError:
        raise TargetError("the onnxruntime target needs onnxruntime", "pip install onnxruntime") from None


def emit(
    network: Network, build: BuildConfig, reader: RecipeReader, writer: EngineWriter, progress: Progress
) -> Emitted:
    """Writes `rank0.engine` and `rank0.weights`."""
    tensors = (value.const_value for value in network.graph.initializers.values())
    weights = in_file_order((tensor for tensor in tensors if isinstance(tensor, Weight)), reader.source_names)
    progress.stage("writing weights", sum(weight.recipe.nbytes for weight in weights))
    entries, digest, stripped = write_kept_weights(writer.folder / WEIGHTS, weights, reader, progress)
    writer.file_hashes[WEIGHTS] = digest
    writer.write_bytes(ENGINE, graph_bytes(network, layout(weights), writer.folder))
    return Emitted(TargetEntry("onnxruntime", library_version(), MINIMUM_VERSION), entries, stripped)


def graph_bytes(network: Network, offsets: Mapping[str, int], folder: Path) -> bytes:
    """The ONNX model, which refers to its weights at their offsets in the file of `folder`."""
    network.model.opset_imports.pop("trtllm", None)
    network.model.opset_imports["com.microsoft"] = 1
    network.model.opset_imports["trtllm.cpu"] = 1

    def place(weight: Weight) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            WEIGHTS, offsets[weight.name or ""], weight.recipe.nbytes, weight.dtype,
            shape=weight.shape, name=weight.name or "", base_dir=str(folder),
        )  # fmt: skip

    return to_proto_without_weights(network.model, place)
