"""LoRA adapters as PEFT publishes them, merged into the tensors of their base, row by row as they are read.

W' = W + strength * (merged - W), where merged is W + scaling * B A, and with DoRA the rows of that, scaled to the
learned magnitudes. Sums are made in float32 and rounded once, to the base's element type: a merged checkpoint that was
saved in that type has the same bits. Format: the `adapter_config.json` and `adapter_model.safetensors` of PEFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trtllm.checkpoints.checkpoint import FunctionTensor, LazyTensor
from trtllm.checkpoints.evaluation import cast_array
from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.dtypes import DType
from trtllm.errors import BadInputError, UnsupportedModelError
from trtllm.frontends.json_files import read_json_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip
_NORM_ROWS = 1024


@dataclass(eq=False)
class _Pair:
    """The low-rank parts of one module."""

    a: np.ndarray | None = None
    b: np.ndarray | None = None
    magnitude: np.ndarray | None = None
    is_embedding: bool = False


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter directory, read: the parts are small and held in memory."""

    path: Path
    config: Mapping[str, Any]
    pairs: Mapping[str, _Pair]
    """By module name."""
    replaced: Mapping[str, np.ndarray]
    """Tensors that were trained whole (modules_to_save, biases), by name."""
    problems: list[str] = field(default_factory=list)

    @property
    def base_name(self) -> str:
        return str(self.config.get("base_model_name_or_path") or "")

    def scaling(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA, by the patterns of the config."""
        rank = int(_by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8)))
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8)))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def merged(self, base: Mapping[str, LazyTensor], strength: float) -> tuple[dict[str, LazyTensor], list[str]]:
        """The base's tensors that the adapter changes, and everything that does not fit the base."""
        problems, result = list(self.problems), dict[str, LazyTensor]()
        for module, pair in self.pairs.items():
            name = _resolved(f"{module}.weight", base)
            if name is None:
                problems.append(f"the adapter changes {module}, which the base does not have")
                continue
            problem = self._misfit(module, pair, base[name])
            if problem:
                problems.append(problem)
            else:
                result[name] = _merged_tensor(base[name], self._merge(module, pair, base[name], strength))
        for tensor_name, values in self.replaced.items():
            name = _resolved(tensor_name, base)
            if name is None:
                problems.append(f"the adapter replaces {tensor_name}, which the base does not have")
            elif values.shape != base[name].spec.shape:
                problems.append(
                    f"{tensor_name} is {values.shape} in the adapter and {base[name].spec.shape} in the base"
                )
            else:
                result[name] = _merged_tensor(base[name], _replacement(base[name], values, strength))
        return result, problems

    def _misfit(self, module: str, pair: _Pair, tensor: LazyTensor) -> str:
        if pair.a is None or pair.b is None:
            return f"the adapter has only one of the two matrices of {module}"
        shape = tensor.spec.shape
        rank = int(_by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8)))
        if pair.a.shape[0] != pair.b.shape[1] or pair.a.shape[0] != rank:
            return f"{module} has matrices {pair.a.shape} and {pair.b.shape}, adapter_config.json says rank {rank}"
        made = (pair.b.shape[0], pair.a.shape[1])
        if len(shape) != 2 or (made[::-1] if self._turned(pair) else made) != shape:
            return f"{module} is {_times(shape)} in the base, the adapter is of one of {_times(made)}"
        if pair.magnitude is not None and pair.magnitude.size != made[0]:
            return f"{module} has {pair.magnitude.size} magnitudes for {made[0]} outputs"
        return ""

    def _turned(self, pair: _Pair) -> bool:
        """Whether the base's tensor is [in, out]: an embedding, or a layer that PEFT marks as fan_in_fan_out."""
        return pair.is_embedding or bool(self.config.get("fan_in_fan_out"))

    def _merge(self, module: str, pair: _Pair, tensor: LazyTensor, strength: float) -> Callable[[int, int], np.ndarray]:
        assert pair.a is not None and pair.b is not None
        scaling = np.float32(self.scaling(module))
        left, right = (pair.a.T, pair.b.T) if self._turned(pair) else (pair.b, pair.a)
        left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)

        def low_rank(start: int, stop: int) -> np.ndarray:
            return scaling * (left[start:stop] @ right)

        if pair.magnitude is None:
            return lambda start, stop: _float32(tensor, start, stop) + np.float32(strength) * low_rank(start, stop)
        dora = _Dora(tensor, low_rank, pair.magnitude.astype(np.float32).reshape(-1), turned=self._turned(pair))
        return lambda start, stop: dora.rows(start, stop, strength)


@dataclass(frozen=True, eq=False)
class _Dora:
    """Weight-decomposed: directions of W + scaling B A, at the learned magnitudes of the outputs."""

    tensor: LazyTensor
    low_rank: Callable[[int, int], np.ndarray]
    magnitude: np.ndarray
    turned: bool

    @cached_property
    def _factors(self) -> np.ndarray:
        """magnitude / norm of each output, in one pass over the tensor."""
        rows = self.tensor.spec.shape[0]
        squares = np.zeros(self.magnitude.size, np.float64)
        for start in range(0, rows, _NORM_ROWS):
            stop = min(start + _NORM_ROWS, rows)
            values = (_float32(self.tensor, start, stop) + self.low_rank(start, stop)).astype(np.float64)
            if self.turned:
                squares += (values**2).sum(axis=0)
            else:
                squares[start:stop] = (values**2).sum(axis=1)
        return (self.magnitude / np.sqrt(squares)).astype(np.float32)

    def rows(self, start: int, stop: int, strength: float) -> np.ndarray:
        base = _float32(self.tensor, start, stop)
        factors = self._factors[None, :] if self.turned else self._factors[start:stop, None]
        merged = (base + self.low_rank(start, stop)) * factors
        return merged if strength == 1 else base + np.float32(strength) * (merged - base)


def read_adapter(path: Path) -> Adapter:
    """The adapter in a directory. Raises BadInputError for damaged files, UnsupportedModelError for another method."""
    config = read_json_object(path / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UnsupportedModelError(
            f"{path} is a {config.get('peft_type')} adapter", "LoRA adapters are merged: train one, or merge this one"
        )
    if not (path / WEIGHTS).is_file():
        raise BadInputError(f"{path} has no {WEIGHTS}", "save the adapter with safe_serialization=True")
    file = SafetensorsFile(path / WEIGHTS)
    pairs: dict[str, _Pair] = {}
    replaced: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for full_name in file.specs:
        name = full_name.removeprefix(_PREFIX).replace(".default.", ".").removesuffix(".default")
        tensor = file.tensor(full_name)
        values = cast_array(tensor.read(), tensor.spec.dtype, DType.FLOAT32)
        part = next((part for part in _PARTS if name.endswith(f".{part}")), None)
        if part is not None:
            pair = pairs.setdefault(name.removesuffix(f".{part}"), _Pair())
            setattr(pair, _PARTS[part], values)
            pair.is_embedding |= "embedding" in part
        elif "lora_" in name:
            problems.append(f"the adapter has {full_name}, which is of a kind that is not merged")
        else:
            replaced[name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = values
    return Adapter(path, config, pairs, replaced, problems)


def _resolved(name: str, base: Mapping[str, LazyTensor]) -> str | None:
    """The base's name of a tensor: itself, or the only one that it ends with or that ends with it."""
    if name in base:
        return name
    near = [known for known in base if known.endswith(f".{name}") or name.endswith(f".{known}")]
    return near[0] if len(near) == 1 else None


def _by_pattern(patterns: Any, module: str, usual: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual


def _float32(tensor: LazyTensor, start: int, stop: int) -> np.ndarray:
    return cast_array(tensor.read(start, stop), tensor.spec.dtype, DType.FLOAT32)


def _replacement(tensor: LazyTensor, values: np.ndarray, strength: float) -> Callable[[int, int], np.ndarray]:
    def rows(start: int, stop: int) -> np.ndarray:
        if strength == 1:
            return values[start:stop]
        base = _float32(tensor, start, stop)
        return base + np.float32(strength) * (values[start:stop] - base)

    return rows


def _merged_tensor(tensor: LazyTensor, rows: Callable[[int, int], np.ndarray]) -> FunctionTensor:
    def rounded(start: int, stop: int) -> np.ndarray:
        return cast_array(np.ascontiguousarray(rows(start, stop)), DType.FLOAT32, tensor.spec.dtype)

    return FunctionTensor(tensor.spec, rounded)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
