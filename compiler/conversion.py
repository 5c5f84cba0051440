"""Writes a model in the project's checkpoint format: config.json, a safetensors file for each rank, and hashes.

Tensors are streamed by their recipes; the directory appears whole or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.pruned import CHECKPOINT_MANIFEST
from trtllm.checkpoints.recipes import Cast, Recipe
from trtllm.checkpoints.safetensors_writer import StoredTensor, WrittenFile, write_safetensors
from trtllm.checkpoints.trtllm_config import format_config, is_tied, layout_of
from trtllm.checkpoints.trtllm_shards import Shard, vocabulary_shard
from trtllm.checkpoints.trtllm_tensors import FullTensor, Layout, RankMapping, full_tensors, shards_of
from trtllm.compiler.engine import EngineWriter, check_free, writing
from trtllm.dtypes import DType
from trtllm.errors import UsageError
from trtllm.progress import Progress, Silent

CHECKPOINT_VERSION = 1
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Converted:
    """A directory that was written."""

    path: Path
    architecture: str
    mapping: RankMapping
    tensors: int
    nbytes: int
    """Of all files with weights."""

    def to_json(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "tp_size": self.mapping.tp_size,
            "pp_size": self.mapping.pp_size,
            "tensors": self.tensors,
            "weights_bytes": self.nbytes,
        }


def convert_model(
    model: str | Path | object,
    output_dir: Path,
    *,
    dtype: str = "auto",
    tp_size: int = 1,
    pp_size: int = 1,
    parallel_embedding: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Converted:
    """Opens a model in any form that a build takes, and writes it; see `convert_checkpoint`."""
    from trtllm.frontends.detect import open_model

    progress = progress or Silent()
    check_free(output_dir.absolute())
    progress.stage("reading the model")
    checkpoint = open_model(model, notify=progress.note)
    return convert_checkpoint(
        checkpoint, output_dir, dtype=dtype, tp_size=tp_size, pp_size=pp_size,
        parallel_embedding=parallel_embedding, threads=threads, progress=progress,
    )  # fmt: skip


def convert_checkpoint(
    checkpoint: Checkpoint,
    output_dir: Path,
    *,
    dtype: str = "auto",
    tp_size: int = 1,
    pp_size: int = 1,
    parallel_embedding: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Converted:
    """Writes `checkpoint` to `output_dir`, which must not exist.

    `dtype` "auto" keeps every tensor as it is. Raises UsageError for a split that the model does not allow.
    """
    progress = progress or Silent()
    layout = checked_layout(checkpoint, tp_size, pp_size, parallel_embedding=parallel_embedding)
    target = None if dtype == "auto" else _float_type(dtype)
    tensors = full_tensors(without_tied_head(checkpoint), layout, checkpoint.source)
    tensors = [replace(tensor, recipe=_cast(tensor.recipe, target)) for tensor in tensors]
    ranks = tensors_by_rank(tensors, layout, tied=is_tied(checkpoint.architecture, checkpoint.config))
    reader = RecipeReader(checkpoint.tensors, threads=threads)
    with writing(output_dir) as writer:
        total = sum(spec_of(name, shard).nbytes for shards in ranks for name, shard in shards)
        progress.stage("writing the checkpoint", total)
        written = {}
        for rank, shards in enumerate(ranks):
            name = f"rank{rank}.safetensors"
            stored = [StoredTensor(spec_of(key, shard), ShardChunks(reader, shard)) for key, shard in shards]
            written[name] = write_safetensors(writer.folder / name, stored, progress)
            writer.file_hashes[name] = written[name].sha256
        name = target.value if target is not None else _usual_type(tensors)
        writer.write_json("config.json", format_config(checkpoint.architecture, checkpoint.config, name, layout))
        write_assets(writer, checkpoint)
        write_checkpoint_manifest(writer, checkpoint.source, written)
    return Converted(output_dir, checkpoint.architecture, layout.mapping, len(tensors), total)


def checked_layout(checkpoint: Checkpoint, tp_size: int, pp_size: int, *, parallel_embedding: bool) -> Layout:
    """Raises UsageError for sizes that are none, or more stages than layers."""
    if tp_size < 1 or pp_size < 1:
        raise UsageError("--tp-size and --pp-size are at least 1", "leave them out for one rank")
    mapping = RankMapping(tp_size, pp_size)
    layout = layout_of(
        checkpoint.architecture, checkpoint.config, checkpoint.source, mapping, parallel_embedding=parallel_embedding
    )
    if pp_size > layout.num_layers:
        raise UsageError(
            f"the model has {layout.num_layers} layers for --pp-size {pp_size}", "choose as many stages or fewer"
        )
    return layout


def write_assets(writer: EngineWriter, checkpoint: Checkpoint) -> None:
    """Tokenizer, chat template, generation and pooling files; names with a folder are written flat."""
    for name, content in checkpoint.assets.items():
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        writer.write_bytes(name.replace("/", "--"), data)


def write_checkpoint_manifest(
    writer: EngineWriter, source: str, written: dict[str, WrittenFile], **sections: Any
) -> None:
    """Hashes of all files so far, and of each tensor of the files with weights."""
    from importlib.metadata import version

    writer.write_json(
        CHECKPOINT_MANIFEST,
        {
            "format_version": CHECKPOINT_VERSION,
            "toolchain_version": version("trtllm-toolchain"),
            "source": source,
            "files": {
                name: {"sha256": entry.sha256, "nbytes": entry.nbytes} for name, entry in writer.file_entries().items()
            },
            "tensors": {name: dict(file.tensors) for name, file in written.items()},
            **sections,
        },
    )


def _float_type(dtype: str) -> DType:
    known = {"float32": DType.FLOAT32, "float16": DType.FLOAT16, "bfloat16": DType.BFLOAT16}
    if dtype not in known:
        raise UsageError(f"unknown dtype '{dtype}'", f"known: auto, {', '.join(known)}")
    return known[dtype]


def _cast(recipe: Recipe, target: DType | None) -> Recipe:
    return recipe if target is None or not recipe.dtype.is_float or recipe.dtype is target else Cast(recipe, target)


def _usual_type(tensors: list[FullTensor]) -> str:
    return Counter(tensor.recipe.dtype.value for tensor in tensors).most_common(1)[0][0]


def without_tied_head(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tensors but for a head that is the embedding's matrix."""
    tied = is_tied(checkpoint.architecture, checkpoint.config)
    return {name: tensor for name, tensor in checkpoint.tensors.items() if not (tied and name == "lm_head.weight")}


def tensors_by_rank(tensors: list[FullTensor], layout: Layout, *, tied: bool) -> list[list[tuple[str, Shard]]]:
    """What each rank holds, by the names in its file. A tied head is written where its rank lacks the embedding."""
    mapping = layout.mapping
    ranks: list[list[tuple[str, Shard]]] = [[] for _ in range(mapping.world_size)]
    for tensor in tensors:
        stage = mapping.stage_of(tensor.placed, layout.num_layers)
        module = mapping.local_name(tensor.placed, layout.family, layout.num_layers)
        for place, shard in enumerate(shards_of(tensor, layout)):
            ranks[stage * mapping.tp_size + place].append((f"{module}.{tensor.ending}", shard))
    decodes = any(rule.ours == "lm_head" for rule in layout.family.last)
    if tied and decodes and mapping.world_size > 1:
        embedding = tensors[0].recipe
        for place in range(mapping.tp_size):
            shard = vocabulary_shard(embedding, place, mapping.tp_size)
            ranks[(mapping.pp_size - 1) * mapping.tp_size + place].append(("lm_head.weight", shard))
    return ranks


def spec_of(name: str, shard: Shard) -> TensorSpec:
    """What the file says of a shard."""
    return TensorSpec(name, shard.shape, shard.recipe.dtype if shard.recipe is not None else DType.FLOAT32)


@dataclass(frozen=True, eq=False)
class ShardChunks:
    """The payload of a shard: its recipe's, then zeros."""

    reader: RecipeReader
    shard: Shard

    def __call__(self) -> Iterator[np.ndarray]:
        spec = spec_of("", self.shard)
        if self.shard.recipe is not None:
            yield from self.reader.chunks(self.shard.recipe)
        left = self.shard.padding * prod(spec.shape[1:])
        while left:
            count = min(left, _CHUNK_ROWS * 1024)
            yield np.zeros(count, spec.dtype.numpy)
            left -= count
