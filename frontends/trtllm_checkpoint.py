"""Reads the project's checkpoint format, split among any number of ranks, under the Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm.checkpoints.checkpoint import Checkpoint, FunctionTensor, LazyTensor, TensorSpec
from trtllm.checkpoints.evaluation import RecipeReader
from trtllm.checkpoints.pruned import PRUNED, PrunedTensor, is_pruned_tensor, pruned_view, read_pruned
from trtllm.checkpoints.recipes import Recipe, Source
from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.checkpoints.trtllm_config import layout_of, read_mapping, read_source_config
from trtllm.checkpoints.trtllm_tensors import Layout, joined_tensors, source_name, their_tensors
from trtllm.errors import BadInputError
from trtllm.frontends.huggingface import dtype_summary
from trtllm.frontends.json_files import read_json_object
from trtllm.frontends.model_assets import POOLING, collect_assets
from trtllm.frontends.tensor_views import renamed


def is_trtllm_checkpoint(directory: Path) -> bool:
    """Whether the directory holds a checkpoint of this format."""
    return (directory / "config.json").is_file() and (directory / "rank0.safetensors").is_file()


def read_trtllm_checkpoint(directory: Path) -> Checkpoint:
    """The model in `directory`. Raises BadInputError for missing ranks and tensors that do not fit the config."""
    source = str(directory)
    config = read_json_object(directory / "config.json")
    own = read_source_config(config, source)
    architecture = str(config["architecture"])
    mapping = read_mapping(config, source)
    parallel = bool(config.get("use_parallel_embedding"))
    layout = layout_of(architecture, own, source, mapping, parallel_embedding=parallel)
    stored = _open_ranks(directory, mapping.world_size)
    joined, unexpected = joined_tensors({name: tensor.spec for name, tensor in stored.items()}, layout, source)
    if unexpected:
        raise BadInputError(
            f"{source} holds tensors that have no place: {', '.join(unexpected)}", "the checkpoint is of another model"
        )
    reader = RecipeReader(stored)
    recipes = their_tensors(joined, layout)
    if own.get("tie_word_embeddings"):
        recipes.pop("lm_head.weight", None)
    tensors = {name: _tensor(name, recipe, reader, stored) for name, recipe in recipes.items()}
    assets = collect_assets(directory)
    files = dict(assets.files)
    flat = directory / POOLING.replace("/", "--")
    if flat.is_file():
        files[POOLING] = flat
    notes = (_found(config, layout, tensors), *assets.notes)
    return Checkpoint("trtllm", source, architecture, own, tensors, files, notes)


def _open_ranks(directory: Path, world_size: int) -> dict[str, LazyTensor]:
    files = [directory / f"rank{rank}.safetensors" for rank in range(world_size)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadInputError(
            f"{directory} lacks {', '.join(missing)}: config.json says {world_size} ranks", "copy the checkpoint again"
        )
    tensors: dict[str, LazyTensor] = {}
    for rank, file in enumerate(files):
        opened, pruned = SafetensorsFile(file), read_pruned(directory).get(file.name, {})
        for name in opened.specs:
            key = source_name(rank, name)
            if name in pruned:
                entry = pruned[name]
                tensors[key] = PrunedTensor(TensorSpec(key, entry.spec.shape, entry.spec.dtype), entry.sha256)
            else:
                tensors[key] = renamed(opened.tensor(name), key)
    return tensors


def _tensor(name: str, recipe: Recipe, reader: RecipeReader, stored: Mapping[str, LazyTensor]) -> LazyTensor:
    """A Hugging Face tensor; the stored one where it is just that, pruned where something it is made of is."""
    spec = TensorSpec(name, recipe.shape, recipe.dtype)
    sources = [stored[source] for source in recipe.sources()]
    if any(is_pruned_tensor(tensor) for tensor in sources):
        sha256 = sources[0].sha256 if isinstance(recipe, Source) and isinstance(sources[0], PrunedTensor) else ""
        return pruned_view(spec, sha256)
    return FunctionTensor(spec, lambda start, stop: reader.rows(recipe, start, stop))


def _found(config: Mapping[str, Any], layout: Layout, tensors: Mapping[str, LazyTensor]) -> str:
    ranks = layout.mapping.world_size
    pruned = ", pruned" if any(map(is_pruned_tensor, tensors.values())) or config.get(PRUNED) else ""
    return (
        f"TensorRT-LLM checkpoint, {config['architecture']}, {ranks} rank{'s' if ranks != 1 else ''}{pruned}, "
        f"{len(tensors)} tensors, {dtype_summary(tensors)}"
    )
