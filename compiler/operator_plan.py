"""What a target makes of a model's operators: runs them as they are, or by others. It reads graphs, not targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir


@dataclass(frozen=True)
class OperatorPlan:
    """One operator of the model, after the passes that ask no target."""

    operator: str
    count: int
    fate: Literal["native", "legalized", "mixed"]
    """Whether all stay as they are, none, or some."""
    becomes: Mapping[str, int]
    """The operators that stand for those that do not stay, and how many."""


Places = Mapping[str, str]
"""Nodes by name, with their operator as people write it."""


def places_of(graph: ir.Graph) -> Places:
    """The named nodes of a graph."""
    return {node.name: _label(node) for node in graph if node.name}


def operator_plan(before: Places, graph: ir.Graph) -> tuple[OperatorPlan, ...]:
    """What became of each node of `before`: nodes that replace another are named after it."""
    after = places_of(graph)
    made: dict[str, Counter[str]] = {}
    for name, operator in after.items():
        owner = name
        while owner not in before and "/" in owner:
            owner = owner.rpartition("/")[0]
        if owner in before and (owner != name or before[owner] != operator):
            made.setdefault(owner, Counter())[operator] += 1
    found: dict[str, list[str]] = {}
    for name, operator in before.items():
        found.setdefault(operator, []).append(name)
    plans = []
    for operator, names in found.items():
        stay = [name for name in names if after.get(name) == operator]
        becomes = sum((made.get(name, Counter()) for name in names if name not in stay), Counter[str]())
        fate: Literal["native", "legalized", "mixed"] = "native" if len(stay) == len(names) else "legalized"
        if stay and fate == "legalized":
            fate = "mixed"
        plans.append(OperatorPlan(operator, len(names), fate, dict(becomes.most_common())))
    return tuple(plans)


def _label(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type
