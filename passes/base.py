"""What a pass is: one rewrite of a network that reports how many places it changed, and why others did not match."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from trtllm.checkpoints.recipes import Recipe
from trtllm.checkpoints.stored import StoredQuantization
from trtllm.compiler.ir.builder import GraphBuilder
from trtllm.compiler.ir.capabilities import Capabilities
from trtllm.compiler.ir.network import Network
from trtllm.config import BuildConfig


@dataclass(frozen=True)
class NearMiss:
    """A place that a pass looked at and left alone."""

    pass_name: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.node}: {self.reason}"


@dataclass(frozen=True)
class CalibratedWeight:
    """Recipes of a weight's integers, scales and minima, as calibration stored them."""

    values: Recipe
    scales: Recipe
    minima: Recipe | None = None


@dataclass(frozen=True, eq=False)
class ChannelRanges:
    """Largest magnitudes of every input channel of a linear layer, float32 [K]."""

    inputs: np.ndarray
    weights: np.ndarray
    """Of the weight's columns."""


@dataclass(frozen=True)
class PassContext:
    """What a pass may know beside the network."""

    build: BuildConfig
    capabilities: Capabilities
    near_misses: list[NearMiss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What the user should be told of the result, for example layers kept in full precision."""
    stored: Mapping[str, StoredQuantization] = field(default_factory=dict)
    """What the tensors that the checkpoint holds quantized are stored as, by name."""
    ranges: Mapping[str, ChannelRanges] = field(default_factory=dict)
    """What calibration has measured at linear layers, by the name of the checkpoint tensor that they multiply by."""
    calibrated: Mapping[str, CalibratedWeight] = field(default_factory=dict)
    """The integers and scales that calibration has chosen for checkpoint tensors, by name."""
    rescaled: Mapping[str, Recipe] = field(default_factory=dict)
    """Initializers that calibration has changed beside: norms whose outputs are scaled, float32."""


class Pass(ABC):
    """One rewrite. Keeps no state between calls."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, network: Network, context: PassContext) -> int:
        """Rewrites in place; returns how many places changed."""

    def miss(self, context: PassContext, node: ir.Node, reason: str) -> None:
        """Records why `node` was left alone."""
        context.near_misses.append(NearMiss(self.name, node.name or node.op_type, reason))


def replace(node: ir.Node, results: list[ir.Value]) -> None:
    """Lets `results` take the place of `node`'s outputs (names of graph outputs included) and removes the node."""
    graph = node.graph
    assert graph is not None and len(results) == len(node.outputs)
    for old, new in zip(node.outputs, results, strict=True):
        is_output = old.is_graph_output()
        if is_output:
            new.name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def builder_before(network: Network, node: ir.Node) -> GraphBuilder:
    """A builder that inserts before `node`, naming its nodes after it."""
    builder = GraphBuilder(network.graph, insert_before=node)
    builder.scope = f"{node.name}/" if node.name else ""
    return builder


def only_user(value: ir.Value) -> ir.Node | None:
    """The single node that reads `value`, None when there are several or it is a graph output."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node
