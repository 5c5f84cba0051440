"""Shares tensors out among the ranks of a tensor-parallel group and joins them again, as recipes.

Query, key and value are cut by heads; where there are more ranks than key-value heads, ranks share a head. A
vocabulary is filled up with rows of zeros until the ranks have equal parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtllm.checkpoints.recipes import Concat, Recipe, Slice
from trtllm.checkpoints.trtllm_layout import Rule, Split
from trtllm.errors import UsageError


@dataclass(frozen=True)
class Heads:
    """Heads of a model's attention, and elements of one."""

    query: int
    key_value: int
    size: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of query, key and value."""
        return self.query * self.size, self.key_value * self.size, self.key_value * self.size


@dataclass(frozen=True)
class Block:
    """Rows that are shared out together: `units` of them, each whole on one rank at least."""

    rows: int
    units: int

    def range_of(self, rank: int, ranks: int) -> tuple[int, int]:
        """The rows of a rank, from the block's first. Units are shared by ranks when there are more ranks."""
        unit = self.rows // self.units
        if self.units >= ranks:
            share = self.units // ranks * unit
            return rank * share, (rank + 1) * share
        place = rank // (ranks // self.units)
        return place * unit, (place + 1) * unit

    def owners(self, ranks: int) -> list[int]:
        """The first rank of each distinct range."""
        found: dict[tuple[int, int], int] = {}
        for rank in range(ranks):
            found.setdefault(self.range_of(rank, ranks), rank)
        return list(found.values())


@dataclass(frozen=True)
class Shard:
    """A rank's part of a tensor: a recipe (None for nothing) and rows of zeros after it."""

    recipe: Recipe | None
    shape: tuple[int, ...]

    @property
    def padding(self) -> int:
        """Rows of zeros."""
        return self.shape[0] - (self.recipe.shape[0] if self.recipe is not None else 0) if self.shape else 0


def blocks_of(rule: Rule, extent: int, heads: Heads | None, ranks: int, name: str) -> tuple[Block, ...]:
    """The blocks of the axis that is cut. Raises UsageError when the ranks cannot have equal parts."""
    if rule.split is Split.HEADS:
        assert heads is not None
        counts = (heads.query, heads.key_value, heads.key_value)
        blocks = tuple(Block(rows, count) for rows, count in zip(heads.rows, counts, strict=True))
    elif rule.experts and len(rule.theirs) > 1:
        rows = extent // len(rule.theirs)
        blocks = tuple(Block(rows, rows) for _ in rule.theirs)
    else:
        blocks = (Block(extent, extent),)
    for block in blocks:
        shared = rule.split is Split.HEADS and block is not blocks[0] and ranks % block.units == 0
        if block.units % ranks and not shared:
            what = "heads" if rule.split is Split.HEADS else "rows or columns"
            raise UsageError(
                f"'{name}' has {block.units} {what}, which {ranks} ranks cannot share equally",
                "choose a --tp-size that divides the attention heads and the width of the MLP",
            )
    return blocks


def axis_of(rule: Rule) -> int:
    """The axis that the rule's split cuts, of a weight."""
    return (1 if rule.split is Split.COLUMNS else 0) + (1 if rule.experts else 0)


def is_whole(rule: Rule, rank_of_shape: int, *, parallel_embedding: bool) -> bool:
    """Whether every rank holds the tensor as it is."""
    if rule.split is Split.NONE or (rule.split is Split.EMBEDDING and not parallel_embedding):
        return True
    return rank_of_shape <= axis_of(rule)


def shard(full: Recipe, rule: Rule, blocks: Sequence[Block], rank: int, ranks: int) -> Shard:
    """The part of `full` that a rank of the group holds."""
    axis, pieces, offset = axis_of(rule), [], 0
    for block in blocks:
        start, stop = block.range_of(rank, ranks)
        pieces.append(_slice(full, axis, offset + start, offset + stop))
        offset += block.rows
    recipe = pieces[0] if len(pieces) == 1 else Concat(tuple(pieces), axis)
    return Shard(recipe, recipe.shape)


def join(parts: Sequence[Recipe], rule: Rule, blocks: Sequence[Block]) -> Recipe:
    """The full tensor of the parts of all ranks, in their order."""
    axis, pieces, offset, ranks = axis_of(rule), [], 0, len(parts)
    for block in blocks:
        start, stop = block.range_of(0, ranks)
        width = stop - start
        pieces += [_slice(parts[rank], axis, offset, offset + width) for rank in block.owners(ranks)]
        offset += width
    return pieces[0] if len(pieces) == 1 else Concat(tuple(pieces), axis)


def vocabulary_shard(full: Recipe, rank: int, ranks: int) -> Shard:
    """A rank's rows of a vocabulary; the last ranks' are filled up with zeros."""
    rows = full.shape[0]
    share = -(-rows // ranks)
    start, stop = min(rank * share, rows), min((rank + 1) * share, rows)
    recipe = _slice(full, 0, start, stop) if start < stop else None
    return Shard(recipe, (share, *full.shape[1:]))


def join_vocabulary(parts: Sequence[Recipe], rows: int) -> Recipe:
    """The first `rows` rows of all parts: what is behind them was filled up."""
    whole = parts[0] if len(parts) == 1 else Concat(tuple(parts), 0)
    return _slice(whole, 0, 0, rows)


def _slice(recipe: Recipe, axis: int, start: int, stop: int) -> Recipe:
    """Without a step where it would change nothing."""
    if (start, stop) == (0, recipe.shape[axis]):
        return recipe
    return Slice(recipe, axis, start, stop)
