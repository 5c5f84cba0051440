"""A TensorRT that is not there: plans with a gathered cache, run through onnxruntime on the memory of a fake GPU.

A plan's model is an onnxruntime engine in the padded form of the same weights. A run gathers each row's cache by its
table, runs the row alone, and hands out what is new, as a real plan would; what lies behind a row's tokens is garbage.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from trtllm.compiler.engine import CONFIG, ENGINE, MANIFEST, Engine, Manifest, TargetEntry, open_engine, writing
from trtllm.runtime.sessions.onnxruntime_library import bind, load

VERSION = "8.6.0"
GARBAGE = 7777.0
NUM_CANDIDATES = 16


@dataclass(frozen=True)
class Shape:
    """One profile: rows, new tokens of each, columns of the table."""

    rows: int
    tokens: int
    columns: int


def write_engine(
    folder: Path,
    model: Engine,
    shapes: Sequence[Shape],
    *,
    num_blocks: int = 24,
    tokens_per_block: int = 8,
    gathers_all: bool = False,
    gives_candidates: bool = True,
    version: str = VERSION,
    capabilities: tuple[str, ...] = ("90",),
    flavour: str = "tensorrt",
) -> Engine:
    """A tensorrt engine of the model that an onnxruntime engine in the padded form holds."""
    config = json.loads(json.dumps(model.config))
    heads = {
        item["name"]: (item["shape"][1], item["shape"][3])
        for item in config["io"]["inputs"]
        if item["name"].startswith(("past_key.", "past_value."))
    }
    plan = {
        "model": str(model.path),
        "shapes": [asdict(shape) for shape in shapes],
        "pools": {name: (num_blocks, count, tokens_per_block, size) for name, (count, size) in heads.items()},
        "gathers_all": gathers_all,
        "candidates": min(NUM_CANDIDATES, config["model"]["vocab_size"]) if gives_candidates else 0,
        "version": version,
    }
    for item in config["io"]["inputs"]:
        if item["name"] in heads:
            item["shape"] = list(plan["pools"][item["name"]])
    if plan["candidates"] and not gathers_all:
        config["io"]["outputs"] += [
            {"name": "candidate_values", "dtype": "FLOAT", "shape": ["batch", plan["candidates"]]},
            {"name": "candidate_indices", "dtype": "INT32", "shape": ["batch", plan["candidates"]]},
            {"name": "log_sum_exp", "dtype": "FLOAT", "shape": ["batch"]},
        ]
    config["build_config"]["gather_context_logits"] = gathers_all
    config["cache"] = {**config["cache"], "kind": "gathered", "tokens_per_block": tokens_per_block}
    target = TargetEntry("tensorrt", version, version, capabilities, flavour=flavour)
    with writing(folder) as writer:
        for path in model.path.iterdir():
            if path.name not in (ENGINE, MANIFEST, CONFIG, "rank0.weights"):
                writer.write_bytes(path.name, path.read_bytes())
        writer.write_bytes(ENGINE, json.dumps(plan).encode())
        writer.write_json(CONFIG, config)
        manifest: Manifest = replace(model.manifest, target=target, files=writer.file_entries(), weights=())
        writer.write_json(MANIFEST, manifest.to_json())
    return open_engine(folder)


def module(device: Any, version: str = VERSION) -> ModuleType:
    """What `import tensorrt` gives, for plans that run on a fake GPU."""
    made = ModuleType("tensorrt")

    class Mode(Enum):
        INPUT = 1
        OUTPUT = 2

    class DataType(Enum):
        FLOAT = 1
        INT32 = 3

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING = range(3)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, data: Any) -> Any:
            plan = json.loads(bytes(data))
            if plan["version"] != version:
                self._logger.log(ILogger.ERROR, "Version tag does not match")
                return None
            return FakeEngine(made, device, self._logger, plan)

    made.__version__ = version
    made.TensorIOMode, made.DataType, made.ILogger, made.Runtime = Mode, DataType, ILogger, Runtime
    return made


class FakeEngine:
    """ICudaEngine."""

    def __init__(self, library: ModuleType, device: Any, logger: Any, plan: dict[str, Any]) -> None:
        self.library, self.device, self.logger, self.plan = library, device, logger, plan
        self.session = load(open_engine(plan["model"], verify=False), 1)
        graph = {item.name: item for item in self.session.get_inputs()}
        self.capacity = int(graph[next(iter(plan["pools"]))].shape[2])
        self.vocab_size = int(self.session.get_outputs()[0].shape[-1])
        self.gathers_all_inside = self.session.get_outputs()[0].shape[1] != 1
        self.num_optimization_profiles = len(plan["shapes"])
        self.device_memory_size = 4096
        integers = {"input_ids": (-1, -1), "past_lengths": (-1,), "lengths": (-1,), "block_table": (-1, -1)}
        logits = (-1, -1, self.vocab_size) if plan["gathers_all"] else (-1, self.vocab_size)
        self._tensors = {name: (True, "INT32", shape) for name, shape in integers.items()}
        self._tensors |= {name: (True, "FLOAT", tuple(shape)) for name, shape in plan["pools"].items()}
        self._tensors["logits"] = (False, "FLOAT", logits)
        if (count := plan["candidates"]) and not plan["gathers_all"]:
            self._tensors["candidate_values"] = (False, "FLOAT", (-1, count))
            self._tensors["candidate_indices"] = (False, "INT32", (-1, count))
            self._tensors["log_sum_exp"] = (False, "FLOAT", (-1,))
        for name, (_, heads, _, size) in plan["pools"].items():
            self._tensors[name.replace("past_", "present_")] = (False, "FLOAT", (-1, -1, heads, size))
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.library.TensorIOMode.INPUT if self._tensors[name][0] else self.library.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.library.DataType[self._tensors[name][1]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][2]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [self.shape_in(name, profile)] * 3

    def shape_in(self, name: str, profile: int) -> tuple[int, ...]:
        shape = self.plan["shapes"][profile]
        extents = {
            "input_ids": (shape["rows"], shape["tokens"]),
            "past_lengths": (shape["rows"],),
            "lengths": (shape["rows"],),
            "block_table": (shape["rows"], shape["columns"]),
        }
        return extents.get(name) or self._tensors[name][2]

    def create_execution_context_without_device_memory(self) -> "FakeContext":
        return FakeContext(self)


class FakeContext:
    """IExecutionContext."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.device_memory = 0

    def set_optimization_profile_async(self, profile: int, handle: int) -> bool:
        self._profile = profile
        return profile < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return self._shapes[name] == self._engine.shape_in(name, self._profile)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address % 256 == 0

    def execute_async_v3(self, handle: int) -> bool:
        device, engine = self._engine.device, self._engine
        stream = type("Stream", (), {"handle": handle})()
        missing = [name for name in engine._tensors if name not in self._addresses]
        if missing or not self.device_memory or (device.refuses_capture and device.is_capturing(stream)):
            engine.logger.log(
                1, f"unbound: {missing}" if missing else "operation not permitted when stream is capturing"
            )
            return False
        device.counts["enqueue"] += 1
        addresses, profile = dict(self._addresses), self._profile
        device.queue(stream, lambda: _run(engine, profile, addresses))
        return True


def _run(engine: FakeEngine, profile: int, addresses: dict[str, int]) -> None:
    device, plan, shape = engine.device, engine.plan, engine.plan["shapes"][profile]
    rows, tokens, columns = shape["rows"], shape["tokens"], shape["columns"]

    def array(name: str, dtype: Any, *extents: int) -> np.ndarray:
        return device.bytes_at(addresses[name], 4 * int(np.prod(extents))).view(dtype).reshape(extents)

    ids, table = array("input_ids", np.int32, rows, tokens), array("block_table", np.int32, rows, columns)
    past, lengths = array("past_lengths", np.int32, rows), array("lengths", np.int32, rows)
    pools = {name: array(name, np.float32, *extents) for name, extents in plan["pools"].items()}
    presents = {
        name: array(name.replace("past_", "present_"), np.float32, rows, tokens, pool.shape[1], pool.shape[3])
        for name, pool in pools.items()
    }
    logits = array("logits", np.float32, rows, tokens if plan["gathers_all"] else 1, engine.vocab_size)
    for output in (logits, *presents.values()):
        output[:] = GARBAGE
    for row in range(rows):
        assert 0 < lengths[row] <= tokens and past[row] <= columns * next(iter(pools.values())).shape[2]
        caches = {name: _gathered(pool, table[row], int(past[row]), engine.capacity) for name, pool in pools.items()}
        made = _run_row(engine, ids[row, : lengths[row]], int(past[row]), caches)
        if plan["gathers_all"]:
            logits[row, : lengths[row]] = made
        else:
            logits[row, 0] = made[-1]
        for name, cache in caches.items():
            presents[name][row, : lengths[row]] = cache[0, :, past[row] : past[row] + lengths[row]].transpose(1, 0, 2)
    if "candidate_values" in addresses:
        count = plan["candidates"]
        order = np.argsort(-logits[:, 0], axis=1, kind="stable")[:, :count]
        array("candidate_indices", np.int32, rows, count)[:] = order
        array("candidate_values", np.float32, rows, count)[:] = np.take_along_axis(logits[:, 0], order, 1)
        most = logits[:, 0].max(1, keepdims=True)
        array("log_sum_exp", np.float32, rows)[:] = (most + np.log(np.exp(logits[:, 0] - most).sum(1, keepdims=True)))[
            :, 0
        ]


def _gathered(pool: np.ndarray, table: np.ndarray, past: int, capacity: int) -> np.ndarray:
    """One row's cache in the padded form. Blocks that a step need not know are read too, as a real gather does."""
    blocks = pool[table].transpose(1, 0, 2, 3).reshape(pool.shape[1], -1, pool.shape[3])
    cache = np.zeros((1, pool.shape[1], capacity, pool.shape[3]), np.float32)
    cache[0, :, :past] = blocks[:, :past]
    return cache


def _run_row(engine: FakeEngine, tokens: np.ndarray, past: int, caches: dict[str, np.ndarray]) -> np.ndarray:
    """Logits [tokens, V], or [1, V] of the last; the caches are extended in place."""
    count = len(tokens)
    logits = np.empty((1, count if engine.gathers_all_inside else 1, engine.vocab_size), np.float32)
    arrays = {
        "input_ids": tokens[None].astype(np.int64),
        "past_lengths": np.array([past], np.int64),
        "lengths": np.array([count], np.int64),
    }
    binding = engine.session.io_binding()
    for name, given in arrays.items():
        bind(binding.bind_input, name, given)
    bind(binding.bind_output, "logits", logits)
    for name, cache in caches.items():
        bind(binding.bind_input, name, cache)
        bind(binding.bind_output, name.replace("past_", "present_"), cache)
    engine.session.run_with_iobinding(binding)
    return logits[0]
