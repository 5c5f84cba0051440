"""Makes a decoder smaller or sparser: a checkpoint with fewer weights, chosen by what they do on a text.

Heads, channels and layers are really gone, from tensors and config.json; sparse weights are zeros in place.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from trtllm.checkpoints.checkpoint import Checkpoint, FunctionTensor, LazyTensor, TensorSpec
from trtllm.checkpoints.trtllm_config import layout_of, value_of
from trtllm.checkpoints.trtllm_shards import Heads
from trtllm.compiler.pruning.measurement import Measurements
from trtllm.errors import UnsupportedModelError, UsageError
from trtllm.frontends.fused_experts import EXPERT_NAMES, ExpertNames

_LAYER = re.compile(r"^(.*\.(?:layers|h)\.)(\d+)(\..*)$")
_EXPERT_WIDTHS = {"Qwen3MoeForCausalLM": "moe_intermediate_size"}
"""The key with the channels of an expert, where dense layers have another one."""


@dataclass(frozen=True)
class PruningScheme:
    """What is to stay: numbers of heads, channels and layers, and the share of weights that become zero."""

    method: Literal["magnitude", "wanda"] | None = None
    sparsity: float = 0.5
    structure: tuple[int, int] | None = None
    """(n, m): of each m neighbouring inputs of an output, n stay."""
    heads: int | None = None
    mlp_channels: int | None = None
    layers: int | None = None

    def __post_init__(self) -> None:
        if self.method is None and self.heads is None and self.mlp_channels is None and self.layers is None:
            raise UsageError("nothing is to be pruned", "give --method, --heads, --mlp-channels or --layers")
        if not 0 < self.sparsity < 1:
            raise UsageError(f"sparsity {self.sparsity} is no share", "choose one between 0 and 1")
        if self.structure is not None and not 0 < self.structure[0] < self.structure[1]:
            raise UsageError(
                f"structure {self.structure[0]}:{self.structure[1]} makes nothing zero", "2:4, for example"
            )
        if self.method is not None and (self.heads is not None or self.mlp_channels is not None):
            raise UsageError(
                "weights are measured before heads and channels go, zeros are chosen after", "prune in two runs"
            )


def prune_model(checkpoint: Checkpoint, scheme: PruningScheme, found: Measurements) -> Checkpoint:
    """`checkpoint` with less in it. Layers go first, then heads and channels; zeros come last.

    Raises UsageError for numbers that the model does not allow, UnsupportedModelError for what its family cannot.
    """
    result = checkpoint
    if scheme.heads is not None:
        result = _with_heads(result, scheme.heads, found)
    if scheme.mlp_channels is not None:
        result = _with_channels(result, scheme.mlp_channels, found)
    if scheme.method is not None:
        result = _sparse(result, scheme, found)
    if scheme.layers is not None:
        result = _with_layers(result, scheme.layers, found)
    return result


# -- zeros ---------------------------------------------------------------------------------------------------------


def _sparse(checkpoint: Checkpoint, scheme: PruningScheme, found: Measurements) -> Checkpoint:
    """Every linear of the layers with its least weights zero, output by output (magnitude: in the whole matrix).

    What chooses experts stays whole: it is small, and a token sent elsewhere is lost.
    """
    tensors = dict(checkpoint.tensors)
    for name in found.squares:
        if not _LAYER.match(name) or name in found.routers:
            continue
        tensor, transposed = tensors[name], _is_transposed(checkpoint)
        inputs = tensor.spec.shape[0 if transposed else 1]
        if scheme.structure is not None and inputs % scheme.structure[1]:
            raise UsageError(
                f"'{name}' has {inputs} inputs, no multiple of {scheme.structure[1]}", "choose --sparsity instead"
            )
        squares = found.squares[name] if scheme.method == "wanda" else None
        tensors[name] = FunctionTensor(tensor.spec, _sparse_rows(tensor, scheme, squares, transposed=transposed))
    return replace(checkpoint, tensors=tensors)


def _sparse_rows(
    tensor: LazyTensor, scheme: PruningScheme, squares: np.ndarray | None, *, transposed: bool
) -> Callable[[int, int], np.ndarray]:
    """Reads rows of the sparse matrix; it is made whole, because neither thresholds nor columns are of rows alone."""

    def rows(start: int, stop: int) -> np.ndarray:
        weights = tensor.read()
        matrix = weights.T if transposed else weights
        score = np.abs(matrix.astype(np.float32))
        if squares is not None:
            score *= np.sqrt(squares).astype(np.float32)
        kept = kept_mask(score, scheme.sparsity, scheme.structure, by_row=scheme.method == "wanda")
        result = np.where(kept, matrix, np.zeros((), matrix.dtype))
        return np.ascontiguousarray(result.T if transposed else result)[start:stop]

    return rows


def kept_mask(score: np.ndarray, sparsity: float, structure: tuple[int, int] | None, *, by_row: bool) -> np.ndarray:
    """Which of score [N, K] stay: n of m neighbours, else all but the share `sparsity`, of each row or of all."""
    if structure is not None:
        n, m = structure
        groups = score.reshape(len(score), -1, m)
        order = np.argsort(-groups, axis=-1, kind="stable")
        kept = np.zeros(groups.shape, bool)
        np.put_along_axis(kept, order[..., :n], True, axis=-1)
        return kept.reshape(score.shape)
    flat = score if by_row else score.reshape(1, -1)
    count = int(flat.shape[1] * sparsity)
    kept = np.ones(flat.shape, bool)
    if count:
        least = np.argpartition(flat, count - 1, axis=1)[:, :count]
        np.put_along_axis(kept, least, False, axis=1)
    return kept.reshape(score.shape)


# -- heads and channels --------------------------------------------------------------------------------------------


def _with_heads(checkpoint: Checkpoint, count: int, found: Measurements) -> Checkpoint:
    """Keeps `count` query heads of every layer, by whole key-value groups where the number allows, else evenly."""
    if _is_transposed(checkpoint):
        raise UnsupportedModelError(
            f"{checkpoint.architecture} ties the size of a head to their number", "prune its channels or layers"
        )
    rope = value_of(checkpoint.config, "rotary_scaling") or {}
    if checkpoint.architecture == "Phi3ForCausalLM" and "long_factor" in rope:
        raise UnsupportedModelError(
            f"transformers derives the rotary factors of {checkpoint.architecture} from the number of heads",
            "prune its channels or layers",
        )
    layout = layout_of(checkpoint.architecture, checkpoint.config, checkpoint.source)
    heads = layout.heads
    group = heads.query // heads.key_value
    whole = count % group == 0
    if not 0 < count < heads.query or not (whole or count % heads.key_value == 0):
        raise UsageError(
            f"{count} of {heads.query} heads cannot stay: {heads.key_value} key-value heads serve {group} each",
            f"keep a multiple of {group} (whole groups) or of {heads.key_value} (as many of each group), "
            f"fewer than {heads.query}",
        )
    tensors = dict(checkpoint.tensors)
    for layer in range(layout.num_layers):
        stem = f"model.layers.{layer}.self_attn"
        score = _column_scores(tensors[f"{stem}.o_proj.weight"], found).reshape(heads.query, -1).sum(axis=1)
        query, key_value = _kept_heads(score, heads, count, whole=whole)
        _cut_attention(tensors, stem, heads, query, key_value)
    kept_kv = count // group if whole else heads.key_value
    config = {"num_attention_heads": count, "num_key_value_heads": kept_kv, "head_dim": heads.size}
    return replace(checkpoint, tensors=tensors, config={**checkpoint.config, **config})


def _kept_heads(score: np.ndarray, heads: Heads, count: int, *, whole: bool) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the query and key-value heads that stay, rising."""
    grouped = score.reshape(heads.key_value, -1)
    width = grouped.shape[1]
    if whole:
        groups = _best(grouped.sum(axis=1), count // width)
        return (groups[:, None] * width + np.arange(width)).reshape(-1), groups
    each = count // heads.key_value
    query = [group * width + _best(scores, each) for group, scores in enumerate(grouped)]
    return np.concatenate(query), np.arange(heads.key_value)


def _cut_attention(
    tensors: dict[str, LazyTensor], stem: str, heads: Heads, query: np.ndarray, key_value: np.ndarray
) -> None:
    def elements(kept: np.ndarray, offset: int = 0) -> np.ndarray:
        return (kept[:, None] * heads.size + np.arange(heads.size)).reshape(-1) + offset

    q_rows, kv_rows, _ = heads.rows
    packed = np.concatenate([elements(query), elements(key_value, q_rows), elements(key_value, q_rows + kv_rows)])
    rows = {
        "q_proj": elements(query), "k_proj": elements(key_value), "v_proj": elements(key_value), "qkv_proj": packed,
    }  # fmt: skip
    for module, kept in rows.items():
        for ending in ("weight", "bias"):
            _replace(tensors, f"{stem}.{module}.{ending}", kept, axis=0)
    _replace(tensors, f"{stem}.o_proj.weight", elements(query), axis=1)


def _with_channels(checkpoint: Checkpoint, count: int, found: Measurements) -> Checkpoint:
    """Keeps `count` channels of every layer's MLP; of a mixture those of each expert, and dense layers stay whole."""
    names = EXPERT_NAMES.get(checkpoint.architecture)
    transposed = _is_transposed(checkpoint)
    layout = layout_of(checkpoint.architecture, checkpoint.config, checkpoint.source)
    key = "n_inner" if transposed else _EXPERT_WIDTHS.get(checkpoint.architecture, "intermediate_size")
    width = _mlp_width(checkpoint)
    if not 0 < count < width:
        raise UsageError(f"{count} of {width} channels cannot stay", f"keep 1 to {width - 1}")
    tensors = dict(checkpoint.tensors)
    for layer in range(layout.num_layers):
        stem = f"{layout.family.prefix}.{layer}"
        if names is not None:
            _cut_experts(tensors, stem, names, count, found)
            continue
        down = f"{stem}.mlp.{'c_proj' if transposed else 'down_proj'}.weight"
        kept = _best(_column_scores(tensors[down], found, transposed=transposed), count)
        for ending in ("weight", "bias"):
            for module in ("gate_proj", "up_proj"):
                _replace(tensors, f"{stem}.mlp.{module}.{ending}", kept, axis=0)
            _replace(tensors, f"{stem}.mlp.gate_up_proj.{ending}", np.concatenate([kept, kept + width]), axis=0)
            _replace(tensors, f"{stem}.mlp.c_fc.{ending}", kept, axis=1 if ending == "weight" else 0)
        _replace(tensors, down, kept, axis=0 if transposed else 1)
    return replace(checkpoint, tensors=tensors, config={**checkpoint.config, key: count})


def _mlp_width(checkpoint: Checkpoint) -> int:
    names = EXPERT_NAMES.get(checkpoint.architecture)
    if names is not None:
        experts = (tensor for name, tensor in checkpoint.tensors.items() if f".experts.0.{names.down}." in name)
        return next(experts).spec.shape[1]
    return int(value_of(checkpoint.config, "intermediate_size") or 4 * value_of(checkpoint.config, "hidden_size"))


def _cut_experts(
    tensors: dict[str, LazyTensor], stem: str, names: ExpertNames, count: int, found: Measurements
) -> None:
    """Each expert of a layer keeps the `count` channels that do most on its own tokens."""
    for expert in itertools.count():
        gate, up, down = (names.matrix(stem, expert, which) for which in ("gate", "up", "down"))
        if down not in tensors:
            return
        kept = _best(_column_scores(tensors[down], found), count)
        _replace(tensors, gate, kept, axis=0)
        _replace(tensors, up, kept, axis=0)
        _replace(tensors, down, kept, axis=1)


def _column_scores(tensor: LazyTensor, found: Measurements, *, transposed: bool = False) -> np.ndarray:
    """What each input adds to the output in the mean: its square times the squares of its weights, float64 [K]."""
    squared = np.square(tensor.read().astype(np.float64)).sum(axis=1 if transposed else 0)
    return squared * found.squares[tensor.spec.name]


def _best(score: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest, rising; the first of equals."""
    return np.sort(np.argsort(-score, kind="stable")[:count])


def _replace(tensors: dict[str, LazyTensor], name: str, kept: np.ndarray, axis: int) -> None:
    if name in tensors:
        tensors[name] = _taken(tensors[name], kept, axis)


def _taken(tensor: LazyTensor, kept: np.ndarray, axis: int) -> LazyTensor:
    """The rows or columns `kept` of a tensor, read with the rows around them."""
    shape = list(tensor.spec.shape)
    shape[axis] = len(kept)

    def rows(start: int, stop: int) -> np.ndarray:
        if axis:
            return np.ascontiguousarray(tensor.read(start, stop)[:, kept])
        wanted = kept[start:stop]
        if not len(wanted):
            return tensor.read(0, 0)
        low = int(wanted.min())
        return np.ascontiguousarray(tensor.read(low, int(wanted.max()) + 1)[wanted - low])

    return FunctionTensor(TensorSpec(tensor.spec.name, tuple(shape), tensor.spec.dtype), rows)


# -- layers --------------------------------------------------------------------------------------------------------


def _with_layers(checkpoint: Checkpoint, count: int, found: Measurements) -> Checkpoint:
    """Keeps the `count` layers that turn the states most."""
    layout = layout_of(checkpoint.architecture, checkpoint.config, checkpoint.source)
    if not 0 < count < layout.num_layers:
        raise UsageError(f"{count} of {layout.num_layers} layers cannot stay", f"keep 1 to {layout.num_layers - 1}")
    if checkpoint.config.get("scale_attn_by_inverse_layer_idx"):
        raise UnsupportedModelError(f"{checkpoint.source} scales attention by the layer's number", "prune its channels")
    kept = _best(np.array([found.influence(layer) for layer in range(layout.num_layers)]), count)
    new = {int(layer): index for index, layer in enumerate(kept)}
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        match = _LAYER.match(name)
        if match is None:
            tensors[name] = tensor
        elif int(match[2]) in new:
            moved = f"{match[1]}{new[int(match[2])]}{match[3]}"
            spec = TensorSpec(moved, tensor.spec.shape, tensor.spec.dtype)
            tensors[moved] = FunctionTensor(spec, tensor.read)
    return replace(checkpoint, tensors=tensors, config=_layers_config(checkpoint, layout.num_layers, new))


def _layers_config(checkpoint: Checkpoint, layers: int, new: Mapping[int, int]) -> dict[str, Any]:
    """config.json of the layers that stay: what it says of each by number follows them."""
    config = dict(checkpoint.config)
    key = next(name for name in ("num_hidden_layers", "n_layer") if name in config)
    config[key] = len(new)
    types = config.get("layer_types") or _layer_types(checkpoint.architecture, config, layers)
    if types is not None:
        config["layer_types"] = [types[layer] for layer in new]
        for pattern in ("sliding_window_pattern", "_sliding_window_pattern"):
            config.pop(pattern, None)
    if checkpoint.architecture == "Qwen3MoeForCausalLM":
        step, dense = config.get("decoder_sparse_step") or 1, set(config.get("mlp_only_layers") or ())
        config["mlp_only_layers"] = [new[layer] for layer in new if layer in dense or (layer + 1) % step]
        config["decoder_sparse_step"] = 1
    return config


def _layer_types(architecture: str, config: Mapping[str, Any], layers: int) -> list[str] | None:
    """The windows that a family's rule gives the layers of a config without `layer_types`."""
    if architecture == "Gemma2ForCausalLM":
        slides = [layer % 2 == 0 for layer in range(layers)]
    elif architecture == "Gemma3ForCausalLM":
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        slides = [(layer + 1) % pattern != 0 for layer in range(layers)]
    elif architecture == "Qwen2ForCausalLM" and config.get("use_sliding_window"):
        slides = [layer >= config.get("max_window_layers", 28) for layer in range(layers)]
    else:
        return None
    return ["sliding_attention" if sliding else "full_attention" for sliding in slides]


def _is_transposed(checkpoint: Checkpoint) -> bool:
    return checkpoint.architecture == "GPT2LMHeadModel"
