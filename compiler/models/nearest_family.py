"""Says which supported architecture an unsupported one is nearest to, and what differs: tensors and config keys.

Each builder is run on a one-layer cut of the checkpoint; only the names it asks for are looked at, no payload is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.compiler.models.context import ModelBuilder
from trtllm.config import build_config
from trtllm.dtypes import DType

_ROTARY_KEYS = ("rope_parameters", "rope_scaling", "partial_rotary_factor")
"""Left out of the comparison: a family may refuse a rotation although all its tensors fit."""
_SHOWN = 3
"""Names listed of each kind of difference."""


@dataclass(frozen=True)
class Comparison:
    """A checkpoint held against one architecture; tensor names have N for their numbers."""

    architecture: str
    unexpected: tuple[str, ...]
    """Tensors of the checkpoint that the architecture does not have."""
    lacking: tuple[str, ...]
    """Tensors of the architecture that the checkpoint does not have."""
    other_keys: tuple[str, ...]
    """Config keys that the architecture does not read."""

    @property
    def distance(self) -> tuple[int, int]:
        return len(self.unexpected) + len(self.lacking), len(self.other_keys)

    def __str__(self) -> str:
        parts = [
            f"{label} {_listed(names)}"
            for label, names in (
                ("unexpected", self.unexpected),
                ("lacks", self.lacking),
                ("other config keys:", self.other_keys),
            )
            if names
        ]
        if not parts:
            return f"{self.architecture}, which has the same tensors and config keys and computes something else"
        tensors = "other" if self.unexpected or self.lacking else "the same"
        return f"{self.architecture}, which has {tensors} tensors: {'; '.join(parts)}"


class _Survey(ModelBuilder):
    """A builder that notes which tensors it was asked for and complains of none."""

    def check_tensors(self) -> None:
        return


def nearest_family(checkpoint: Checkpoint, builders: Mapping[str, Callable[[Any], Any]]) -> Comparison | None:
    """The architecture of `builders` that differs least from the checkpoint, None when none has a tensor of its."""
    one_layer = replace(checkpoint, config=_one_layer(checkpoint.config))
    present = _patterns(checkpoint.tensors)
    found = [_compare(one_layer, present, name, builder) for name, builder in builders.items()]
    return min((item for item in found if item is not None), key=lambda item: item.distance, default=None)


def _compare(
    checkpoint: Checkpoint, present: frozenset[str], name: str, builder: Callable[[Any], Any]
) -> Comparison | None:
    survey = _Survey(checkpoint, build_config({"max_seq_len": 1, "max_input_len": 1}), DType.FLOAT32)
    try:
        builder(survey)
    except Exception:  # a config of another family may break a builder anywhere: then it is not the nearest one
        return None
    wanted = _patterns(survey.used)
    if not wanted & present:
        return None
    lacking = wanted - present - _patterns(name for name in survey.used if name.startswith("lm_head."))
    return Comparison(name, tuple(sorted(present - wanted)), tuple(sorted(lacking)), tuple(survey.config.unread()))


def _one_layer(config: Mapping[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key not in _ROTARY_KEYS}
    cut: dict[str, Any] = {key: 1 for key in ("num_hidden_layers", "n_layer") if key in config}
    types = config.get("layer_types")
    return {**config, **cut, **({"layer_types": types[:1]} if isinstance(types, list) else {})}


def _patterns(names: Iterable[str]) -> frozenset[str]:
    return frozenset(re.sub(r"\d+", "N", name) for name in names)


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
