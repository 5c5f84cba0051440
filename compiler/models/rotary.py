"""Rotary position tables of every scaling that transformers knows, as constants or as a small subgraph.

The formulas follow transformers' `modeling_rope_utils.py` (5.x): default, linear, llama3 and yarn have one table of
frequencies; longrope has two, chosen by the row's total length; dynamic (NTK) recomputes its base from it. Frequencies
and angles are computed in float32, in the order of operations used there, so that tables agree to the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trtllm.compiler.ir.builder import GraphBuilder, dims
from trtllm.compiler.models.model_config import ModelConfig
from trtllm.dtypes import DType
from trtllm.errors import BadInputError, UnsupportedModelError, nearest

F32 = DType.FLOAT32


@dataclass(frozen=True)
class RotaryConfig:
    """The rotary parameters of one kind of layer."""

    kind: str
    theta: float
    rotary_size: int
    """Rotated elements of a head, R."""
    max_positions: int
    """max_position_embeddings of the model."""
    parameters: Mapping[str, Any]

    @property
    def is_static(self) -> bool:
        """Whether an angle depends on the position alone."""
        return self.kind not in ("dynamic", "longrope")


def rotary_config(
    config: ModelConfig,
    head_size: int,
    *,
    parameters: Mapping[str, Any] | None = None,
    partial: bool = False,
    original_positions: int | None = None,
    aliases: Mapping[str, str] | None = None,
    default_theta: float = 10000.0,
) -> RotaryConfig:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (earlier) of a config.json.

    Args:
        parameters: those of one layer type, where the config keeps several; the config's own keys then stay unread.
        partial: whether the family can rotate a part of each head only.
        original_positions: what an absent original_max_position_embeddings means to the family.
        aliases: names that the family gives to a scaling.
        default_theta: what an absent rope_theta means to the family.

    Raises UnsupportedModelError for a scaling that no formula here covers, BadInputError for missing parameters.
    """
    given = dict(_flat_parameters(config, original_positions) if parameters is None else parameters)
    kind = str(given.get("rope_type") or given.get("type") or "default")
    kind = {"su": "longrope", **(aliases or {})}.get(kind, kind)
    if kind not in _KINDS:
        raise UnsupportedModelError(
            f"{config.source}: config.json asks for rope scaling {nearest(kind, _KINDS)}, which is not known",
            f"known scalings: {', '.join(_KINDS)}",
        )
    _check_parameters(config, kind, given)
    return RotaryConfig(
        kind=kind,
        theta=float(given.get("rope_theta") or default_theta),
        rotary_size=_rotary_size(config, given, head_size, partial),
        max_positions=config.integer("max_position_embeddings"),
        parameters=given,
    )


def _flat_parameters(config: ModelConfig, original_positions: int | None) -> Mapping[str, Any]:
    """The one set of parameters of a config; keys outside the set belong to it, as in transformers."""
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    given = dict(scaling or parameters or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        raise UnsupportedModelError(
            f"{config.source}: config.json has rotary parameters per layer type, which this architecture lacks",
            "the config is of another architecture",
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        if given.get(key) is None:
            given[key] = config.get(key)
    original = config.get("original_max_position_embeddings", original_positions)
    return given if original is None else given | {"original_max_position_embeddings": original}


def _check_parameters(config: ModelConfig, kind: str, given: Mapping[str, Any]) -> None:
    missing = [key for key in _KINDS[kind] if given.get(key) is None]
    if missing:
        raise config.problem(f"has rope scaling '{kind}', which lacks {', '.join(missing)}")
    for key in _NUMBERS:
        value = given.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise config.problem(f"has {key} = {value!r} among its rotary parameters, expected a number")
    if "mrope_section" in given:
        raise UnsupportedModelError(
            f"{config.source}: config.json asks for multi-modal rotation (mrope_section), which is not supported",
            "supported are text models with one position per token",
        )


def _rotary_size(config: ModelConfig, given: Mapping[str, Any], head_size: int, partial: bool) -> int:
    factor = given.get("partial_rotary_factor")
    size = int(head_size * float(1.0 if factor is None else factor))
    if size != head_size and not partial:
        raise UnsupportedModelError(
            f"{config.source}: config.json has partial_rotary_factor = {factor}, which this architecture does not know",
            "supported: partial_rotary_factor = 1.0",
        )
    if size % 2 or size <= 0:
        raise UnsupportedModelError(
            f"{config.source}: rotary embedding of {size} of {head_size} head elements is not supported",
            "the rotated part must be an even number of elements",
        )
    return size


_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
"""Each scaling and the parameters it cannot do without; yarn's factor follows from the lengths when it is null."""

_NUMBERS = (
    "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor",
)  # fmt: skip


class Rotary:
    """Cosines and sines of one rotary config for the positions of a step; asking twice gives the same values."""

    def __init__(self, builder: GraphBuilder, config: RotaryConfig, *, name: str, capacity: int) -> None:
        self.config = config
        self._builder = builder
        self._name = name
        self._capacity = capacity

    def cos_sin(self, positions: ir.Value, lengths: ir.Value, past_lengths: ir.Value) -> tuple[ir.Value, ir.Value]:
        """cos and sin, float32 [B, S, R/2], of positions [B, S]."""
        b = self._builder
        if self.config.is_static:
            cos, sin = rotary_tables(self.config, self._capacity)
            return self._gather("cos", cos, positions), self._gather("sin", sin, positions)
        total = b.op("Add", [past_lengths, lengths])
        angles = self._angles(positions, self._frequencies(total))
        scale = b.constant(attention_factor(self.config), F32)
        return b.op("Mul", [b.op("Cos", [angles]), scale]), b.op("Mul", [b.op("Sin", [angles]), scale])

    def _gather(self, which: str, table: np.ndarray, positions: ir.Value) -> ir.Value:
        b = self._builder
        values = b.named_constant(f"{self._name}.{which}", table)
        return b.op("Gather", [values, positions], (*dims(positions), table.shape[1]), F32, axis=0)

    def _frequencies(self, total: ir.Value) -> ir.Value:
        """Inverse frequencies [B, 1, R/2] for rows of total length [B]."""
        b, config = self._builder, self.config
        batch = dims(total)[0]
        half = config.rotary_size // 2
        column = b.op("Unsqueeze", [total, b.constant([1, 2])], (batch, 1, 1), DType.INT64)
        if config.kind == "longrope":
            short, long = (b.constant(table) for table in longrope_frequencies(config))
            limit = b.constant(_original_positions(config))
            beyond = b.op("Greater", [column, limit], (batch, 1, 1), DType.BOOL)
            return b.op("Where", [beyond, long, short], (batch, 1, half), F32)
        length = b.op(
            "Max", [b.op("Cast", [column], None, F32, to=ir.DataType.FLOAT), _number(b, config.max_positions)]
        )
        factor = float(config.parameters["factor"])
        stretch = b.op("Div", [b.op("Mul", [length, _number(b, factor)]), _number(b, config.max_positions)])
        stretch = b.op("Sub", [stretch, _number(b, factor - 1.0)])
        size = config.rotary_size
        base = b.op("Mul", [b.op("Pow", [stretch, _number(b, size / (size - 2))]), _number(b, config.theta)])
        exponents = b.constant(_exponents(size))
        powers = b.op("Pow", [base, exponents], (batch, 1, half), F32)
        return b.op("Reciprocal", [powers])

    def _angles(self, positions: ir.Value, frequencies: ir.Value) -> ir.Value:
        b = self._builder
        batch, sequence = dims(positions)
        numbers = b.op("Cast", [positions], None, F32, to=ir.DataType.FLOAT)
        column = b.op("Unsqueeze", [numbers, b.constant([2])], (batch, sequence, 1), F32)
        return b.op("Mul", [column, frequencies], (batch, sequence, self.config.rotary_size // 2), F32)


def rotary_tables(config: RotaryConfig, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of a static config for positions 0 .. capacity-1: float32 [capacity, R/2]."""
    angles = np.arange(capacity, dtype=np.float32)[:, None] * static_frequencies(config)[None, :]
    factor = np.float32(attention_factor(config))
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)


def static_frequencies(config: RotaryConfig) -> np.ndarray:
    """Inverse frequencies, float32 [R/2], of a scaling that does not depend on length."""
    match config.kind:
        case "default":
            return _inverse_frequencies(config)
        case "linear":
            return (_inverse_frequencies(config) / np.float32(config.parameters["factor"])).astype(np.float32)
        case "llama3":
            return _llama3(config)
        case "yarn":
            return _yarn(config)
    raise AssertionError(f"{config.kind} has no static frequencies")


def attention_factor(config: RotaryConfig) -> float:
    """The factor on cos and sin (yarn and longrope; 1 elsewhere)."""
    parameters = config.parameters
    if config.kind not in ("yarn", "longrope"):
        return 1.0
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    factor = parameters.get("factor") or config.max_positions / _original_positions(config)
    if config.kind == "longrope":
        return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(_original_positions(config)))
    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all:
        return _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all)
    return _yarn_scale(factor, 1.0)


def longrope_frequencies(config: RotaryConfig) -> tuple[np.ndarray, np.ndarray]:
    """Inverse frequencies for rows up to and beyond the original length: float32 [R/2] each."""
    powers = (np.float32(config.theta) ** _exponents(config.rotary_size)).astype(np.float32)
    tables = []
    for key in ("short_factor", "long_factor"):
        factors = np.asarray(config.parameters[key], dtype=np.float32)
        if factors.shape != powers.shape:
            raise BadInputError(
                f"config.json: {key} has {factors.size} entries, the rotary size wants {powers.size}",
                "take the config of the published model",
            )
        tables.append((1.0 / (factors * powers)).astype(np.float32))
    return tables[0], tables[1]


def _original_positions(config: RotaryConfig) -> int:
    return int(config.parameters.get("original_max_position_embeddings") or config.max_positions)


def _exponents(size: int) -> np.ndarray:
    return np.arange(0, size, 2, dtype=np.float32) / np.float32(size)


def _inverse_frequencies(config: RotaryConfig) -> np.ndarray:
    return (1.0 / (np.float32(config.theta) ** _exponents(config.rotary_size))).astype(np.float32)


def _llama3(config: RotaryConfig) -> np.ndarray:
    frequencies = _inverse_frequencies(config)
    factor = np.float32(config.parameters["factor"])
    low, high = float(config.parameters["low_freq_factor"]), float(config.parameters["high_freq_factor"])
    original = _original_positions(config)
    wavelength = np.float32(2 * math.pi) / frequencies
    scaled = np.where(wavelength > original / low, frequencies / factor, frequencies).astype(np.float32)
    smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(medium, smoothed, scaled).astype(np.float32)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(config: RotaryConfig) -> np.ndarray:
    parameters, size = config.parameters, config.rotary_size
    factor = parameters.get("factor") or config.max_positions / _original_positions(config)

    def correction(rotations: float) -> float:
        original = _original_positions(config)
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = correction(parameters.get("beta_fast") or 32), correction(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(span), 0, 1)
    powers = (np.float32(config.theta) ** _exponents(size)).astype(np.float32)
    extrapolated, interpolated = 1.0 / powers, 1.0 / (np.float32(factor) * powers)
    return (interpolated * ramp + extrapolated * (1 - ramp)).astype(np.float32)


def _number(b: GraphBuilder, value: float) -> ir.Value:
    return b.constant(value, F32)
