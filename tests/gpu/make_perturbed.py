"""Writes a checkpoint with other weights than a model's, and the network package that a build of it would have made.

    python tests/gpu/make_perturbed.py model.gguf build/gpu/packages/SmolLM2-fp32 build/gpu/packages/perturbed

FOLDER/model.safetensors is what an engine is refitted to; FOLDER/network, finished, is the fresh build that it must
then equal. Every tensor gets noise of a hundredth of its deviation, from a seed of its name.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from trtllm.checkpoints.checkpoint import LazyTensor, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import recipe_from_json
from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.checkpoints.safetensors_writer import StoredTensor, write_safetensors
from trtllm.compiler.engine import MANIFEST, RECIPES
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.refit.recipes import rebound
from trtllm.compiler.targets.tensorrt.emit import NETWORK_WEIGHTS
from trtllm.compiler.targets.weights_file import write_weights
from trtllm.dtypes import DType
from trtllm.frontends.detect import open_model
from trtllm.progress import Silent

SHARE = 0.01


def perturbed(tensor: LazyTensor) -> np.ndarray:
    """float32: the tensor and noise."""
    values = tensor.read().astype(np.float32)
    seed = int.from_bytes(hashlib.sha256(tensor.spec.name.encode()).digest()[:4], "little")
    noise = np.random.default_rng(seed).standard_normal(values.shape, dtype=np.float32)
    return values + np.float32(SHARE * (float(values.std()) or 1.0)) * noise


def write_checkpoint(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """The perturbed tensors, one in memory at a time."""

    def stored(name: str, tensor: LazyTensor) -> StoredTensor:
        def chunks() -> Iterator[np.ndarray]:
            yield perturbed(tensor)

        return StoredTensor(TensorSpec(name, tensor.spec.shape, DType.FLOAT32), chunks)

    write_safetensors(path, [stored(name, tensor) for name, tensor in tensors.items()], Silent())


def write_package(package: Path, target: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """The package with the weights that its recipes make of other tensors."""
    shutil.copytree(package, target, ignore=shutil.ignore_patterns(NETWORK_WEIGHTS))
    manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    recipes = json.loads((target / RECIPES).read_text(encoding="utf-8"))
    weights = [
        Weight(entry["name"], rebound(recipe_from_json(recipes[entry["name"]]), tensors))
        for entry in manifest["weights"]
    ]
    offsets = {entry["name"]: entry["offset"] for entry in manifest["weights"]}
    entries, digest = write_weights(target / NETWORK_WEIGHTS, weights, RecipeReader(tensors), Silent(), offsets)
    hashes = {entry.name: entry.sha256 for entry in entries}
    for entry in manifest["weights"]:
        entry["sha256"] = hashes[entry["name"]]
    manifest["files"][NETWORK_WEIGHTS]["sha256"] = digest
    (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Writes both, and says where."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("package", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    checkpoint = open_model(arguments.model, notify=print)
    arguments.folder.mkdir(parents=True)
    path = arguments.folder / "model.safetensors"
    write_checkpoint(path, checkpoint.tensors)
    file = SafetensorsFile(path)
    write_package(arguments.package, arguments.folder / "network", {name: file.tensor(name) for name in file.specs})
    print(f"{path}, {arguments.folder / 'network'}")


if __name__ == "__main__":
    main()
