"""Recipes between the project's checkpoint format and Hugging Face tensors: both directions, whole or in shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trtllm.checkpoints.checkpoint import LazyTensor, TensorSpec
from trtllm.checkpoints.recipes import Concat, Recipe, Reshape, Slice, Source, Stack, Transpose
from trtllm.checkpoints.trtllm_layout import Family, Placed, Rule, Split, placed_rules
from trtllm.checkpoints.trtllm_shards import (
    Heads,
    Shard,
    axis_of,
    blocks_of,
    is_whole,
    join,
    join_vocabulary,
    shard,
    vocabulary_shard,
)
from trtllm.errors import BadInputError, UsageError

ENDINGS = ("weight", "bias")


@dataclass(frozen=True)
class RankMapping:
    """Ranks by tensor and by pipeline; rank = pipeline place * tp_size + tensor place."""

    tp_size: int = 1
    pp_size: int = 1

    @property
    def world_size(self) -> int:
        return self.tp_size * self.pp_size

    def layers_of(self, stage: int, num_layers: int) -> range:
        """The layers of a pipeline stage; the first stages take what is left over."""
        share, rest = divmod(num_layers, self.pp_size)
        start = stage * share + min(stage, rest)
        return range(start, start + share + (stage < rest))

    def stage_of(self, placed: Placed, num_layers: int) -> int:
        if placed.layer is None:
            return self.pp_size - 1 if placed.is_last else 0
        return next(stage for stage in range(self.pp_size) if placed.layer in self.layers_of(stage, num_layers))

    def local_name(self, placed: Placed, family: Family, num_layers: int) -> str:
        """Its module in the file of its stage, where layers count from the stage's first."""
        if placed.layer is None:
            return placed.ours
        first = self.layers_of(self.stage_of(placed, num_layers), num_layers)[0]
        return f"{family.our_prefix}.{placed.layer - first}.{placed.rule.ours}"


@dataclass(frozen=True)
class Layout:
    """What a model's config says about the shape of its checkpoint."""

    family: Family
    num_layers: int
    heads: Heads
    vocab_size: int
    mapping: RankMapping = RankMapping()
    parallel_embedding: bool = False
    num_experts: int = 0

    def rules(self) -> Iterator[Placed]:
        return placed_rules(self.family, self.num_layers)

    def is_whole(self, rule: Rule, axes: int) -> bool:
        return is_whole(rule, axes, parallel_embedding=self.parallel_embedding)


@dataclass(frozen=True)
class FullTensor:
    """A tensor of the format before it is shared out."""

    placed: Placed
    ending: str
    recipe: Recipe
    """Over the tensors of the Hugging Face checkpoint."""

    @property
    def name(self) -> str:
        return f"{self.placed.ours}.{self.ending}"


def full_tensors(tensors: Mapping[str, LazyTensor], layout: Layout, source: str) -> list[FullTensor]:
    """Every tensor of the format that `tensors`, by their Hugging Face names, make.

    Raises BadInputError that lists tensors that are missing beside others, and those that have no place.
    """
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    found, used, missing = [], set(), []
    for placed in layout.rules():
        for ending in ENDINGS:
            names = _their_names(placed, ending, layout)
            present = [name for name in names if name in specs]
            if not present:
                continue
            used.update(present)
            if len(present) < len(names):
                missing += [name for name in names if name not in specs]
                continue
            found.append(FullTensor(placed, ending, _make(placed.rule, [specs[name] for name in names])))
    unexpected = [name for name in specs if name not in used]
    parts = [
        f"{kind}: {', '.join(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
    ]
    if parts:
        raise BadInputError(
            f"the tensors of {source} are not those of its architecture: {'; '.join(parts)}",
            "the checkpoint is incomplete or of another model",
        )
    return found


def _their_names(placed: Placed, ending: str, layout: Layout) -> list[str]:
    if not placed.rule.experts:
        return [f"{name}.{ending}" for name in placed.theirs]
    return [f"{name.format(expert)}.{ending}" for expert in range(layout.num_experts) for name in placed.theirs]


def _make(rule: Rule, specs: list[TensorSpec]) -> Recipe:
    parts = [_turned(rule, Source.of(spec)) for spec in specs]
    if rule.half is not None:
        rows = parts[0].shape[0] // 2
        return Slice(parts[0], 0, rule.half * rows, (rule.half + 1) * rows)
    if rule.experts:
        count = len(rule.theirs)
        groups = [tuple(parts[index : index + count]) for index in range(0, len(parts), count)]
        return Stack(tuple(group[0] if count == 1 else Concat(group, 0) for group in groups))
    return parts[0] if len(parts) == 1 else Concat(tuple(parts), 0)


def _turned(rule: Rule, recipe: Recipe) -> Recipe:
    return Transpose(recipe, (1, 0)) if rule.transposed and len(recipe.shape) == 2 else recipe


def shards_of(tensor: FullTensor, layout: Layout) -> list[Shard]:
    """What each rank of the tensor-parallel group holds of it."""
    rule, full, ranks = tensor.placed.rule, tensor.recipe, layout.mapping.tp_size
    if layout.is_whole(rule, len(full.shape)):
        return [Shard(full, full.shape)] * ranks
    if rule.split in (Split.VOCABULARY, Split.EMBEDDING):
        return [vocabulary_shard(full, rank, ranks) for rank in range(ranks)]
    axis = axis_of(rule)
    if rule.split is Split.HEADS and full.shape[axis] != sum(layout.heads.rows):
        raise BadInputError(
            f"'{tensor.name}' has {full.shape[axis]} rows, the heads of config.json make {sum(layout.heads.rows)}",
            "the config and the weights are of different models",
        )
    blocks = blocks_of(rule, full.shape[axis], layout.heads, ranks, tensor.name)
    return [shard(full, rule, blocks, rank, ranks) for rank in range(ranks)]


@dataclass(frozen=True)
class Joined:
    """A tensor of the format, put together from the ranks' files; `sources` are named by `source_name`."""

    placed: Placed
    ending: str
    recipe: Recipe


def source_name(rank: int, name: str) -> str:
    """The name of a rank's tensor among those of all ranks."""
    return f"rank{rank}/{name}"


def joined_tensors(specs: Mapping[str, TensorSpec], layout: Layout, source: str) -> tuple[list[Joined], list[str]]:
    """Every full tensor, from the specs of all ranks' tensors by `source_name`; and the names that have no place.

    Raises BadInputError when some ranks lack a tensor that others have, or shapes differ.
    """
    found, used = [], set()
    for placed in layout.rules():
        stage = layout.mapping.stage_of(placed, layout.num_layers)
        module = layout.mapping.local_name(placed, layout.family, layout.num_layers)
        for ending in ENDINGS:
            ranks = range(stage * layout.mapping.tp_size, (stage + 1) * layout.mapping.tp_size)
            names = [source_name(rank, f"{module}.{ending}") for rank in ranks]
            present = [name for name in names if name in specs and _is_of(placed.rule, specs[name])]
            used.update(present)
            if not present:
                continue
            if len(present) < len(names) or len({specs[name].shape for name in names}) > 1:
                raise BadInputError(
                    f"{source}: the ranks do not fit together in '{module}.{ending}'", "convert the model again"
                )
            parts = [Source.of(specs[name]) for name in names]
            found.append(Joined(placed, ending, _joined(placed, parts, layout, f"{module}.{ending}")))
    return found, [name for name in specs if name not in used]


def _is_of(rule: Rule, spec: TensorSpec) -> bool:
    """Dense layers and mixtures share names; only a mixture's matrices are stacked."""
    return rule.experts == (len(spec.shape) == 3)


def _joined(placed: Placed, parts: list[Source], layout: Layout, name: str) -> Recipe:
    rule = placed.rule
    if layout.is_whole(rule, len(parts[0].shape)):
        return parts[0]
    if rule.split in (Split.VOCABULARY, Split.EMBEDDING):
        if len(parts) * parts[0].shape[0] < layout.vocab_size:
            raise BadInputError(
                f"'{name}' has fewer rows than vocab_size {layout.vocab_size}", "the checkpoint is of another model"
            )
        return join_vocabulary(parts, layout.vocab_size)
    axis, ranks = axis_of(rule), len(parts)
    extent = sum(layout.heads.rows) if rule.split is Split.HEADS else parts[0].shape[axis] * ranks
    blocks = blocks_of(rule, extent, layout.heads, ranks, name)
    expected = sum(stop - start for start, stop in (block.range_of(0, ranks) for block in blocks))
    if parts[0].shape[axis] != expected:
        raise BadInputError(
            f"'{name}' has {parts[0].shape[axis]} rows, config.json implies {expected}",
            "the config and the weights are of different models",
        )
    try:
        return join(parts, rule, blocks)
    except UsageError as error:
        raise BadInputError(error.what, "convert the model again") from None


def their_tensors(joined: list[Joined], layout: Layout) -> dict[str, Recipe]:
    """The Hugging Face tensors of a checkpoint, as recipes over the ranks' tensors."""
    result: dict[str, Recipe] = {}
    halves: dict[str, list[Recipe]] = {}
    for tensor in joined:
        rule, names = tensor.placed.rule, _their_names(tensor.placed, tensor.ending, layout)
        if rule.half is not None:
            halves.setdefault(names[0], []).append(tensor.recipe)
        elif rule.experts:
            result |= zip(names, _experts(tensor.recipe, rule), strict=True)
        else:
            result |= zip(names, _pieces(tensor, layout), strict=True)
    return result | {name: Concat(tuple(parts), 0) for name, parts in halves.items()}


def _pieces(tensor: Joined, layout: Layout) -> Iterator[Recipe]:
    rule, count = tensor.placed.rule, len(tensor.placed.theirs)
    if count == 1:
        yield _turned(rule, tensor.recipe)
        return
    assert count == len(layout.heads.rows)
    offset = 0
    for rows in layout.heads.rows:
        yield Slice(tensor.recipe, 0, offset, offset + rows)
        offset += rows


def _experts(stack: Recipe, rule: Rule) -> Iterator[Recipe]:
    experts, rows, _ = stack.shape
    rows //= len(rule.theirs)
    for expert in range(experts):
        matrix = Reshape(Slice(stack, 0, expert, expert + 1), stack.shape[1:])
        for index in range(len(rule.theirs)):
            yield matrix if len(rule.theirs) == 1 else Slice(matrix, 0, index * rows, (index + 1) * rows)
