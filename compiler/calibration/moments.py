"""What calibration text puts into linear layers, summed, and the weights that make up for what came before them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

SHARE = 0.5
"""Of the deviation that a weight is to make up for. All of it fits the calibration text too closely; on SmolLM2-135M
half is best or near it with 4 thousand tokens as with 128 thousand."""
DAMPING = 0.01
"""Of the mean second moment, added to each in the regression, and more the fewer tokens there are (`_ridge`)."""
SCARCITY = 0.25


@dataclass(eq=False)
class InputMoments:
    """Sums over tokens of one value that linears read: x of the quantized model so far, y of the full one."""

    own: np.ndarray
    """x x', float64 [K, K]."""
    full: np.ndarray | None = None
    """(y - x) x', float64 [K, K]; None where both are the same."""
    residual: Mapping[ir.Node, np.ndarray] = field(default_factory=dict)
    """Of linears whose outputs are added to the states: (states of the full model - states) x', float64 [N, K]."""
    tokens: int = 0

    def aimed(self, weight: np.ndarray, linear: ir.Node) -> np.ndarray:
        """The weight [N, K] that rounding is to come near to, float32.

        Its outputs on x are those of `weight` on y, and make up for what the states lack, by `SHARE` and as far as x
        tells: the least squares solution W + (W (Y - X) X' + (R - S) X') (X X' + ridge)^-1.
        """
        if self.full is None:
            return weight
        wanted = weight.astype(np.float64) @ self.full
        residual = self.residual.get(linear)
        if residual is not None:
            wanted += residual
        damped = self.own + np.eye(len(self.own)) * self._ridge()
        change = np.linalg.solve(damped, wanted.T).T
        return (weight + SHARE * change).astype(np.float32)

    def _ridge(self) -> float:
        mean = max(float(np.diag(self.own).mean()), 1e-30)
        return mean * (DAMPING + SCARCITY * len(self.own) / max(self.tokens, 1))


def added_linear(entry: ir.Value | None, exit_value: ir.Value, linears: tuple[ir.Node, ...]) -> ir.Node | None:
    """The linear whose outputs a segment adds to the states that came in, to give those that go on."""
    producer = exit_value.producer()
    if entry is None or producer is None or producer.op_type != "Add" or entry not in producer.inputs:
        return None
    others = [value for value in producer.inputs if value is not entry and value is not None]
    return next((linear for linear in linears if others and linear.outputs[0] is others[0]), None)
