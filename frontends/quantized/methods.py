"""Opens the tensors of a quantized checkpoint: finds its method, and puts one weight in the place of its parts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trtllm.checkpoints.checkpoint import LazyTensor
from trtllm.checkpoints.stored import QuantizedTensor
from trtllm.errors import BadInputError, UnsupportedModelError
from trtllm.frontends.quantized.awq import open_awq
from trtllm.frontends.quantized.bitsandbytes import open_bitsandbytes
from trtllm.frontends.quantized.compressed_tensors import open_compressed_tensors
from trtllm.frontends.quantized.config import QuantizationConfig
from trtllm.frontends.quantized.fp8 import open_fp8
from trtllm.frontends.quantized.gptq import open_gptq
from trtllm.frontends.quantized.modelopt import open_modelopt

Opener = Callable[[Mapping[str, LazyTensor], QuantizationConfig], dict[str, LazyTensor]]

_METHODS: Mapping[str, Opener] = {
    "awq": open_awq,
    "gptq": open_gptq,
    "compressed-tensors": open_compressed_tensors,
    "fp8": open_fp8,
    "bitsandbytes": open_bitsandbytes,
    "modelopt": open_modelopt,
}
_ACTIVATIONS = re.compile(
    r"\.(input_scale|input_zero_point|input_global_scale|output_scale|[qkv]_scale|[qkv]_zero_point|prob_scale)$"
)


@dataclass(frozen=True, eq=False)
class OpenedWeights:
    """Tensors under the names of the unquantized model, and what the user should know of them."""

    tensors: Mapping[str, LazyTensor]
    notes: tuple[str, ...]


def open_quantized(tensors: Mapping[str, LazyTensor], config: QuantizationConfig) -> OpenedWeights:
    """Raises UnsupportedModelError for a method or variant that is not read, BadInputError for parts that misfit."""
    opener = _METHODS.get(config.method)
    if opener is None:
        raise UnsupportedModelError(
            f"{config.source} is quantized: quantization method '{config.method}' is not read",
            f"methods that are read: {', '.join(_METHODS)}; or pass the checkpoint before quantization",
        )
    weights = {name: tensor for name, tensor in tensors.items() if not _ACTIVATIONS.search(name)}
    opened = opener(weights, config)
    stored = Counter(tensor.stored.method for tensor in opened.values() if isinstance(tensor, QuantizedTensor))
    if not stored:
        raise BadInputError(
            f"config.json of {config.source} says quantization method '{config.method}', but no tensor is stored so",
            "the config and the weights are of different models; remove quantization_config, or fetch the model again",
        )
    notes = ["quantized: " + ", ".join(f"{count} tensors {method}" for method, count in stored.most_common())]
    if len(weights) < len(tensors):
        notes.append(f"ignored, scales of activations, which are rounded as they come: {len(tensors) - len(weights)}")
    return OpenedWeights(opened, tuple(notes))
