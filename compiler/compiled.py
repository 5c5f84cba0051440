"""A network after its passes, and how it came about: what the pipeline hands to plans, emitters and reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trtllm.compiler.ir.network import Network
from trtllm.compiler.ir.weights import Weight
from trtllm.compiler.operator_plan import OperatorPlan
from trtllm.compiler.targets.table import Target
from trtllm.config import BuildConfig
from trtllm.dtypes import DType
from trtllm.passes.base import NearMiss


@dataclass(frozen=True)
class PassReport:
    """How many places a pass changed."""

    name: str
    changes: int


@dataclass(frozen=True, eq=False)
class Compiled:
    """A legalized network."""

    network: Network
    build: BuildConfig
    """With everything filled in that the model decides."""
    target: Target
    dtype: DType
    """The type it computes in."""
    passes: tuple[PassReport, ...]
    near_misses: tuple[NearMiss, ...]
    notes: tuple[str, ...]
    network_hash: str = ""
    calibration_tokens: np.ndarray | None = None
    """int64 [rows, length]: what it was calibrated on; None for a scheme that needs no calibration."""
    operators: tuple[OperatorPlan, ...] = ()
    """What the target made of the model's operators."""

    @property
    def weights(self) -> list[Weight]:
        values = (value.const_value for value in self.network.graph.initializers.values())
        return [weight for weight in values if isinstance(weight, Weight)]
