"""What is in an engine directory or a checkpoint, as one record: weights, recipes, graph, cache, versions, state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtllm.checkpoints.checkpoint import Checkpoint
from trtllm.checkpoints.pruned import is_pruned_tensor, pruned_hashes
from trtllm.checkpoints.recipes import Recipe
from trtllm.checkpoints.safetensors_file import SafetensorsFile
from trtllm.checkpoints.stored import stored_quantizations
from trtllm.compiler.engine import Engine, open_engine
from trtllm.compiler.inspection.difference import is_engine
from trtllm.compiler.inspection.graph import GraphSummary, graph_summary, layer_of
from trtllm.compiler.inspection.payloads import payload_hash
from trtllm.compiler.inspection.quantization_error import QuantizationErrors, quantization_errors, quantizing_step
from trtllm.compiler.refit.adapter import CONFIG as ADAPTER_CONFIG
from trtllm.compiler.refit.adapter import WEIGHTS as ADAPTER_WEIGHTS
from trtllm.compiler.refit.adapter import read_adapter
from trtllm.compiler.refit.recipes import stored_recipes
from trtllm.compiler.refit.refit import read_history
from trtllm.errors import UsageError
from trtllm.progress import Progress
from trtllm.sizes import format_size

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "*.nemo", "*.msgpack", "*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class WeightRecord:
    """A weight of an engine or a tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    """As stored in an engine; of a checkpoint's tensor, as it is read (quantized ones dequantized)."""
    quantization: str | None
    sha256: str
    """Empty when it is not known without reading."""
    state: str
    """"held", "stripped" (from an engine) or "pruned" (from a checkpoint)."""
    layer: int | None
    recipe: str | None = None
    """How an engine makes it, as an expression of checkpoint tensors."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that an engine needs to run."""

    weights: int
    cache_per_token: int
    """Of one sequence, while no window is full."""
    cache_at_limits: int
    """max_batch_size sequences of max_seq_len tokens; a layer with a window keeps no more tokens than that."""
    max_batch_size: int
    max_seq_len: int


@dataclass(frozen=True)
class Contents:
    """Everything that an inspection found."""

    kind: str
    """"engine", "checkpoint" or "adapter"."""
    path: str
    format: str
    """Of an engine: its target; of a checkpoint: what the frontend recognised; of an adapter: its PEFT type."""
    architecture: str
    state: str
    versions: Mapping[str, str]
    model: Mapping[str, Any]
    """The model's own config."""
    build: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cache: Mapping[str, Any]
    passes: Mapping[str, int]
    files: Mapping[str, int]
    """Bytes of each file of an engine, or of each file that goes with a checkpoint's tensors where it is in memory."""
    weights: tuple[WeightRecord, ...]
    notes: tuple[str, ...]
    graph: GraphSummary | None = None
    memory: MemoryPlan | None = None
    errors: QuantizationErrors | None = None
    stored_bytes: int | None = None
    """Of the files that hold a checkpoint's tensors, which may be quantized; None where they are not on this disk."""

    @property
    def nbytes(self) -> int:
        """Of all weights, those too that are missing."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def missing_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights if weight.state != "held")

    def to_json(self) -> dict[str, Any]:
        return {
            **{key: value for key, value in vars(self).items() if key not in ("weights", "graph", "memory", "errors")},
            "bytes": self.nbytes,
            "missing_bytes": self.missing_bytes,
            "weights": [asdict(weight) for weight in self.weights],
            "graph": self.graph.to_json() if self.graph is not None else None,
            "memory": asdict(self.memory) if self.memory is not None else None,
            "quantization_error": self.errors.to_json() if self.errors is not None else None,
        }


def inspect(path: str, progress: Progress, *, reference: str | None = None, hashes: bool = False) -> Contents:
    """What `path` (an engine directory, whatever a build takes, or a LoRA adapter) holds.

    Args:
        reference: the model that an engine was built from, for the error of its quantized weights.
        hashes: read a checkpoint's payloads to hash them; those of an engine are in its manifest.

    Raises UsageError for a reference of something that is no engine, and whatever opening raises.
    """
    from trtllm.frontends.detect import open_model

    if is_engine(path):
        engine = open_engine(path, verify=False)
        model = open_model(reference, notify=progress.note) if reference is not None else None
        return _engine_contents(engine, quantization_errors(engine, model, progress) if model is not None else None)
    if reference is not None:
        raise UsageError(f"--reference goes with an engine, and {path} is none", "trtllm-diff compares two checkpoints")
    if (Path(path) / ADAPTER_CONFIG).is_file():
        return _adapter_contents(Path(path), hashes=hashes)
    return _checkpoint_contents(open_model(path), progress, hashes=hashes)


def _engine_contents(engine: Engine, errors: QuantizationErrors | None) -> Contents:
    manifest, config = engine.manifest, engine.config
    recipes, missing = stored_recipes(engine), set(manifest.stripped)
    weights = tuple(
        WeightRecord(
            entry.name, entry.shape, entry.dtype, entry.nbytes,
            entry.quantization or quantizing_step(recipes[entry.name]), entry.sha256,
            "stripped" if entry.name in missing else "held", layer_of(entry.name), expression(recipes[entry.name]),
        )
        for entry in manifest.weights
    )  # fmt: skip
    target = manifest.target
    versions = {"toolchain": manifest.toolchain_version, target.flavour or target.name: target.version}
    versions |= {f"{target.name} at least": target.minimum_version, **manifest.packages}
    pretrained = dict(config.get("pretrained_config", {}))
    return Contents(
        kind="engine", path=str(engine.path), format=target.name,
        architecture=str(pretrained.get("architecture", "")), state=_engine_state(engine), versions=versions,
        model=pretrained, build=config.get("build_config", {}),
        inputs=tuple(_spelled(item) for item in config.get("io", {}).get("inputs", ())),
        outputs=tuple(_spelled(item) for item in config.get("io", {}).get("outputs", ())),
        cache=config.get("cache", {}), passes=config.get("passes", {}),
        files={name: entry.nbytes for name, entry in manifest.files.items()}, weights=weights,
        notes=(f"network {manifest.network_hash}", *config.get("notes", ())),
        graph=graph_summary(engine), memory=memory_plan(engine), errors=errors,
    )  # fmt: skip


def _engine_state(engine: Engine) -> str:
    manifest = engine.manifest
    words = []
    if manifest.stripped:
        words.append(f"stripped: {len(manifest.stripped)} of {len(manifest.weights)} weights are missing")
    if manifest.stripped_sources:
        words.append("built from a pruned checkpoint")
    history = read_history(engine)
    if history is not None:
        words.append("refitted: the weights are not those of the build")
    return "; ".join(words) or "complete"


def memory_plan(engine: Engine) -> MemoryPlan:
    """Weights, and the cache by the groups and limits of config.json."""
    build = engine.config.get("build_config", {})
    rows, length = int(build.get("max_batch_size") or 1), int(build.get("max_seq_len") or 0)
    groups = engine.config.get("cache", {}).get("groups", ())
    at_limits = sum(rows * min(length, group["window"] or length) * group["bytes_per_token"] for group in groups)
    per_token = sum(group["bytes_per_token"] for group in groups)
    return MemoryPlan(engine.manifest.weights_nbytes, per_token, at_limits, rows, length)


def weights_line(found: Contents) -> str:
    """How many weights there are, how large, and how many bytes of files or of missing ones that means."""
    parts = [f"{len(found.weights)}, {format_size(found.nbytes)}"]
    if found.stored_bytes is not None and found.kind == "checkpoint":
        parts.append(f"{format_size(found.stored_bytes)} in its files")
    if found.missing_bytes:
        parts.append(f"{format_size(found.missing_bytes)} missing")
    return ", ".join(parts)


def numbered_together(items: Sequence[str]) -> list[str]:
    """Neighbours that differ by their number alone as one: "past_key.0..29 float[1, 64] (30 of them)"."""
    series: dict[str, list[str]] = {}
    for item in items:
        name, _, rest = item.partition(" ")
        stem, _, number = name.rpartition(".")
        key = f"{stem} {rest}" if stem and number.isdigit() else item
        series.setdefault(key, []).append(item)
    return [_series(members) for members in series.values()]


def _series(members: Sequence[str]) -> str:
    if len(members) < 3:
        return "; ".join(members)
    name, _, rest = members[0].partition(" ")
    last = members[-1].partition(" ")[0].rpartition(".")[2]
    return f"{name}..{last} {rest} ({len(members)} of them)"


def _spelled(item: Mapping[str, Any]) -> str:
    return f"{item['name']} {str(item['dtype']).lower()}[{', '.join(map(str, item['shape']))}]"


def _checkpoint_contents(checkpoint: Checkpoint, progress: Progress, *, hashes: bool) -> Contents:
    known, stored = pruned_hashes(checkpoint.tensors), stored_quantizations(checkpoint.tensors)
    if hashes:
        progress.stage("hashing tensors", len(checkpoint.tensors))
    weights = []
    for name, tensor in checkpoint.tensors.items():
        pruned = is_pruned_tensor(tensor)
        digest = known.get(name, "") if pruned or not hashes else payload_hash(tensor)
        method = stored[name].method if name in stored else None
        spec = tensor.spec
        weights.append(
            WeightRecord(
                name, spec.shape, spec.dtype.value, spec.nbytes, method, digest,
                "pruned" if pruned else "held", layer_of(name),
            )
        )  # fmt: skip
        if hashes:
            progress.advance(1)
    count = sum(weight.state == "pruned" for weight in weights)
    return Contents(
        kind="checkpoint", path=checkpoint.source, format=checkpoint.format, architecture=checkpoint.architecture,
        state=f"pruned: {count} of {len(weights)} tensors are missing" if count else "complete", versions={},
        model=dict(checkpoint.config), build={}, inputs=(), outputs=(), cache={}, passes={},
        files={name: _size(content) for name, content in checkpoint.assets.items()}, weights=tuple(weights),
        notes=checkpoint.notes, stored_bytes=_stored_bytes(Path(checkpoint.source)),
    )  # fmt: skip


def _stored_bytes(path: Path) -> int | None:
    """Of the weights' files at a path: of the file itself, or of a directory's files of the first kind that it has."""
    if path.is_file():
        return path.stat().st_size
    kinds = ([file.stat().st_size for file in path.glob(pattern)] for pattern in _WEIGHT_FILES)
    return next((sum(sizes) for sizes in kinds if sizes), None)


def _adapter_contents(path: Path, *, hashes: bool) -> Contents:
    """A LoRA adapter without its base: its own tensors, by the modules that they change."""
    adapter = read_adapter(path)
    file = SafetensorsFile(path / ADAPTER_WEIGHTS)
    tensors = {name: file.tensor(name) for name in file.specs}
    weights = tuple(
        WeightRecord(
            name, tensor.spec.shape, tensor.spec.dtype.value, tensor.spec.nbytes, None,
            payload_hash(tensor) if hashes else "", "held", layer_of(name),
        )
        for name, tensor in tensors.items()
    )  # fmt: skip
    notes = (f"changes {len(adapter.pairs)} modules of {adapter.base_name or 'a base that it does not name'}",)
    return Contents(
        kind="adapter", path=str(path), format=str(adapter.config.get("peft_type", "LORA")), architecture="",
        state="; ".join(adapter.problems) or "complete", versions={}, model=dict(adapter.config), build={}, inputs=(),
        outputs=(), cache={}, passes={}, files={}, weights=weights, notes=notes,
        stored_bytes=(path / ADAPTER_WEIGHTS).stat().st_size,
    )  # fmt: skip


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else Path(content).stat().st_size


def expression(recipe: Recipe) -> str:
    """A recipe as one line: "transpose(concat(cast(q_proj.weight), ...))"."""
    name = getattr(recipe, "name", None)
    if name is not None and not recipe.operands:
        return str(name) if recipe.step == "source" else f"{recipe.step} {name}"
    return f"{recipe.step}({', '.join(expression(operand) for operand in recipe.operands)})"
