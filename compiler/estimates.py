"""The arithmetic of a build's cost: bytes of memory and disk from recipes and the graph, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.evaluation import DEFAULT_CHUNK_BYTES
from trtllm.checkpoints.working_memory import chunk_memory
from trtllm.compiler.compiled import Compiled
from trtllm.compiler.ir.builder import dims, dtype_of
from trtllm.compiler.ir.network import TOKENS_PER_BLOCK
from trtllm.compiler.ir.text import to_proto_without_weights
from trtllm.compiler.ir.weights import DTYPES, Weight
from trtllm.compiler.targets.weights_file import file_nbytes, in_file_order

SMALLEST_CHUNK = 1 << 20
RECORD_BYTES = 2000
"""Of recipes.json and manifest.json for each weight, with room to spare."""
ALLOCATOR_SLACK = 24 << 20
"""Small arrays, thread stacks and what the allocator keeps."""
BUILDER_BYTES = 900 << 20
"""What a builder that holds the weights itself takes beside them: its library and the candidates it weighs."""
BUILDER_COPIES = 2
"""How often such a builder holds the weights: in its own layout, and serialized."""
RUNTIME_BYTES = 90 << 20
"""A loaded engine's process without weights and cache: Python, numpy, the library."""
RUNTIME_COPIES = 1.25
"""A library that repacks weights for its kernels holds the one at hand twice, and keeps some of the old form."""


@dataclass(frozen=True)
class WorkingMemory:
    """What the streaming of weights takes beside the process as it stands."""

    nbytes: int
    largest_weight: str
    """The weight that decides it."""


def streaming_memory(weights: Iterable[Weight], checkpoint: Checkpoint, chunk_bytes: int) -> WorkingMemory:
    """One chunk in the making, and those that wait to be written: at most `chunk_bytes`, or one that is larger."""
    widening = _reading_factor(checkpoint)
    found = []
    before = 0
    for weight in in_file_order(weights, checkpoint.tensors):
        chunk = chunk_memory(weight.recipe, chunk_bytes)
        waiting = max(before, chunk.result) if chunk.is_one_of_many else before
        found.append((chunk.peak * widening + max(waiting, chunk_bytes), weight.name or ""))
        before = chunk.result
    nbytes, name = max(found, default=(0, ""))
    return WorkingMemory(nbytes + ALLOCATOR_SLACK, name)


def _reading_factor(checkpoint: Checkpoint) -> int:
    """GGUF tensors are widened while they are read, which holds them twice."""
    return 2 if checkpoint.format == "gguf" else 1


def fitting_chunk(weights: list[Weight], checkpoint: Checkpoint, budget: int | None) -> int:
    """The largest chunk whose working memory keeps within `budget` bytes; the smallest when none does."""
    chunk = DEFAULT_CHUNK_BYTES
    while budget is not None and chunk > SMALLEST_CHUNK:
        if streaming_memory(weights, checkpoint, chunk).nbytes <= budget:
            break
        chunk //= 2
    return chunk


def builder_memory(compiled: Compiled) -> int:
    """What the target's own builder takes; nothing where weights stay outside the engine."""
    if compiled.target.capabilities.external_weights:
        return 0
    return BUILDER_BYTES + BUILDER_COPIES * weights_nbytes(compiled)


def load_memory(compiled: Compiled) -> int:
    """An estimate for a process that runs the engine, its cache full."""
    return RUNTIME_BYTES + int(RUNTIME_COPIES * weights_nbytes(compiled)) + cache_nbytes(compiled)


def weights_nbytes(compiled: Compiled) -> int:
    """Bytes of all weights in the engine: exact."""
    return sum(weight.recipe.nbytes for weight in compiled.weights)


def engine_nbytes(compiled: Compiled, checkpoint: Checkpoint) -> int:
    """Bytes of the engine directory: weights and their padding exactly, the records of weights estimated."""
    graph = len(to_proto_without_weights(compiled.network.model))
    assets = sum(
        len(content) if isinstance(content, bytes) else content.stat().st_size for content in checkpoint.assets.values()
    )
    weights = compiled.weights
    return file_nbytes(weights) + graph + assets + RECORD_BYTES * (len(weights) + 2)


def disk_nbytes(compiled: Compiled, checkpoint: Checkpoint) -> int:
    """Bytes of disk at the worst moment: a builder reads the weights from a scratch file while it writes the engine."""
    scratch = 0 if compiled.target.capabilities.external_weights else weights_nbytes(compiled)
    return engine_nbytes(compiled, checkpoint) + scratch


def cache_nbytes(compiled: Compiled) -> int:
    """Bytes of the key-value cache at max_batch_size sequences of max_seq_len tokens, in whole blocks."""
    tokens = compiled.build.max_seq_len or 0
    if compiled.network.cache_groups:
        tokens = -(-tokens // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK
    return compiled.build.max_batch_size * tokens * cache_nbytes_per_token(compiled)


def cache_nbytes_per_token(compiled: Compiled, layers: Iterable[int] | None = None) -> int:
    """Bytes that a token of one sequence takes in the caches of all layers, or of those given."""
    cache = compiled.network.info.cache
    chosen = range(len(cache)) if layers is None else layers
    inputs = {value.name: value for value in compiled.network.graph.inputs}
    return sum(2 * _row_bytes(inputs[f"past_key.{i}"]) for i in chosen)


def _row_bytes(cache: ir.Value) -> int:
    """Bytes of one token in a cache [blocks or rows, kv heads, tokens, elements]."""
    _, heads, _, elements = dims(cache)
    return DTYPES[dtype_of(cache)].byte_size(int(heads) * int(elements))
