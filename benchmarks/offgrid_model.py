"""Copies a Llama whose weights lie on the grid of a quantization to one whose weights do not, for judging schemes.

    python benchmarks/offgrid_model.py MODEL OUTPUT_DIR [--noise 0.25] [--seed 0]
    python benchmarks/offgrid_model.py MODEL OUTPUT_DIR --shuffle

A model published as 4-bit integers flatters whoever rounds to the same grid. With `--noise` each linear weight gets
uniform noise of that share of its block's step to either side: another model, a little worse, whose grid still shows
through. `--shuffle` puts channels in another order (of the states, of the feed-forward part, and within the heads'
values) in every weight that they run through: the model computes the same, to float16's rounding of its weights, but
no block keeps its neighbours, so nothing of the grid is left.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

BLOCK = 32
Rearranged = Callable[[str, np.ndarray], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--noise", type=float, default=0.25)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from safetensors.numpy import save_file

    from trtllm.frontends.detect import open_model

    checkpoint = open_model(arguments.model, notify=print)
    random = np.random.default_rng(arguments.seed)
    change = shuffled(checkpoint.config, random) if arguments.shuffle else noisy(arguments.noise, random)
    tensors = {name: change(name, tensor.read().astype(np.float32)) for name, tensor in checkpoint.tensors.items()}
    arguments.output_dir.mkdir(parents=True)
    halves = {name: np.ascontiguousarray(values, np.float16) for name, values in tensors.items()}
    save_file(halves, str(arguments.output_dir / "model.safetensors"), metadata={"format": "pt"})
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config = {**config, "architectures": [checkpoint.architecture], "torch_dtype": "float16"}
    (arguments.output_dir / "config.json").write_text(json.dumps(config, indent=1))
    for name, content in checkpoint.assets.items():
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        (arguments.output_dir / name).write_bytes(data)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def noisy(share: float, random: np.random.Generator) -> Rearranged:
    """Uniform noise of `share` steps to either side; a step is a 15th of a block's range."""

    def changed(name: str, values: np.ndarray) -> np.ndarray:
        if not is_linear(name):
            return values
        blocks = values.reshape(len(values), -1, BLOCK)
        steps = (blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)) / 15
        return (blocks + share * steps * random.uniform(-1, 1, blocks.shape)).reshape(values.shape)

    return changed


def shuffled(config: dict, random: np.random.Generator) -> Rearranged:
    """Channels in another order, the same in each weight that they run through."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    states = random.permutation(config["hidden_size"])
    inner, values = [], []
    for _ in range(config["num_hidden_layers"]):
        inner.append(random.permutation(config["intermediate_size"]))
        values.append([random.permutation(size) for _ in range(groups)])

    def changed(name: str, weight: np.ndarray) -> np.ndarray:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return weight[:, states]
        if weight.ndim == 1:
            return weight[states]
        layer, part = int(name.split(".")[2]), name.split(".")[-2]
        own = values[layer]
        if part == "v_proj":
            return weight[np.concatenate([order + index * size for index, order in enumerate(own)])][:, states]
        if part == "o_proj":
            each = [own[head * groups // heads] + head * size for head in range(heads)]
            return weight[states][:, np.concatenate(each)]
        if part == "down_proj":
            return weight[states][:, inner[layer]]
        if part in ("gate_proj", "up_proj"):
            return weight[inner[layer]][:, states]
        return weight[:, states]

    return changed


if __name__ == "__main__":
    main()
