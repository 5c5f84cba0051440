"""Writes the `network.weights` of network packages that were copied without it, from the checkpoint they were made of.

    python tests/gpu/restore_weights.py model.gguf build/gpu/packages/SmolLM2-fp32 build/gpu/packages/SmolLM2-fp16

A quantized checkpoint is a fraction of the weights of all its packages, so that one copy of it is less to carry. The
package's manifest has the file's hash, which is checked: what is finished is what was written.
"""

import argparse
import json
import sys
from pathlib import Path

from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.recipes import recipe_from_json
from trtllm.compiler.engine import MANIFEST, RECIPES
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.targets.tensorrt.emit import NETWORK_WEIGHTS
from trtllm.compiler.targets.weights_file import write_weights
from trtllm.frontends.detect import open_model
from trtllm.progress import Silent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("packages", nargs="+", type=Path)
    arguments = parser.parse_args()
    checkpoint = open_model(arguments.model, notify=print)
    for package in arguments.packages:
        manifest = json.loads((package / MANIFEST).read_text(encoding="utf-8"))
        recipes = json.loads((package / RECIPES).read_text(encoding="utf-8"))
        weights = [Weight(entry["name"], recipe_from_json(recipes[entry["name"]])) for entry in manifest["weights"]]
        reader = RecipeReader(checkpoint.tensors)
        offsets = {entry["name"]: entry["offset"] for entry in manifest["weights"]}
        _, digest = write_weights(package / NETWORK_WEIGHTS, weights, reader, Silent(), offsets)
        if digest != manifest["files"][NETWORK_WEIGHTS]["sha256"]:
            (package / NETWORK_WEIGHTS).unlink()
            print(f"{package}: the weights are others than it was written with")
            return 1
        print(f"{package}: {NETWORK_WEIGHTS} restored")
    return 0


if __name__ == "__main__":
    sys.exit(main())
