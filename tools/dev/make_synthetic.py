"""Writes a Llama checkpoint of any size with random bfloat16 weights, streaming: `make_synthetic.py PRESET FOLDER`.

For measuring builds, not for generating text. The weights repeat one pool of seeded normal values, each tensor from
another place of it: their statistics are those of a fresh model, and 16 GB take as long as the disk does.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

POOL_ELEMENTS = 1 << 24
SHARD_BYTES = 4_900_000_000
"""What Hugging Face's own sharding aims at, near enough."""
DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 8192

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every weight's shape by name, in the order of the files: layer by layer, sorted within a layer."""
        hidden, key_value = self.hidden_size, self.num_key_value_heads * self.head_size
        layer = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, self.intermediate_size),
            "mlp.gate_proj": (self.intermediate_size, hidden),
            "mlp.up_proj": (self.intermediate_size, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (key_value, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (key_value, hidden),
        }
        layers = {
            f"model.layers.{index}.{name}.weight": shape
            for index in range(self.num_hidden_layers)
            for name, shape in layer.items()
        }
        ends = {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocab_size, hidden)}
        return {"model.embed_tokens.weight": (self.vocab_size, hidden), **layers, **ends}


PRESETS = {
    "llama3-8b": Shape(128256, 4096, 14336, 32, 32, 8),
    "300mb": Shape(32000, 1024, 3072, 10, 16, 4, 2048),
    "tiny": Shape(300, 64, 96, 2, 4, 2, 128),
}


def write_checkpoint(shape: Shape, folder: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes the model's directory; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    pool = make_pool(seed)
    shards = list(split(shape.tensors(), shard_bytes))
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_shard(folder / name, tensors, pool)
        weight_map |= dict.fromkeys(tensors, name)
    total = sum(2 * prod(extents) for extents in shape.tensors().values())
    if len(shards) > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    write_json(folder / "config.json", config_of(shape))
    write_tokenizer(folder)
    return total


def make_pool(seed: int) -> np.ndarray:
    """Seeded normal values as bfloat16 bit patterns."""
    values = np.random.default_rng(seed).standard_normal(POOL_ELEMENTS, dtype=np.float32) * DEVIATION
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def split(tensors: dict[str, tuple[int, ...]], shard_bytes: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Consecutive tensors, as many as fit in a shard."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in tensors.items():
        if shard and size + 2 * prod(shape) > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += 2 * prod(shape)
    yield shard


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], pool: np.ndarray) -> None:
    """One safetensors file, a piece of the pool at a time."""
    header, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in tensors.items():
            for piece in pieces(name, prod(shape), pool):
                written = piece.data.cast("B")
                while written.nbytes:
                    written = written[file.write(written) :]


def pieces(name: str, elements: int, pool: np.ndarray) -> Iterator[np.ndarray]:
    """The values of a tensor: ones for a norm, else the pool from a place that its name decides."""
    if "norm" in name:
        yield np.full(elements, 0x3F80, np.uint16)
        return
    start = zlib.crc32(name.encode()) % len(pool)
    while elements:
        piece = pool[start : start + elements]
        yield piece
        elements -= len(piece)
        start = 0


def config_of(shape: Shape) -> dict[str, object]:
    """config.json in the words of transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 256,
        "eos_token_id": 257,
    }


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, so that an engine of the model can be loaded and asked."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Parse, write, say how much."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="another number of layers than the preset's")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists")
    shape = PRESETS[arguments.preset]
    if arguments.layers:
        shape = replace(shape, num_hidden_layers=arguments.layers)
    total = write_checkpoint(shape, arguments.folder, seed=arguments.seed)
    print(f"{arguments.folder}: {total / 1e9:.2f} GB of weights")


if __name__ == "__main__":
    main()
