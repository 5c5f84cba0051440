"""A stand-in for TensorRT 9 to 11 that takes any layer and refuses every name that its version does not have.

`tensorrt_names.json` lists, for each version, the public names of the classes of its Python bindings (taken from their
published source) that the emitter and the session use; "layers" are the attributes of all layers. It computes nothing.
"""

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

VERSIONS: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_name("tensorrt_names.json").read_text())


class _Member:
    _numbers = count()

    def __init__(self, name: str) -> None:
        self.name, self._number = name, next(self._numbers)

    def __int__(self) -> int:
        return 0


class _Object:
    """An instance of one of the module's classes: `values` gives results by name, any other method gives None."""

    def __init__(self, real: str, names: list[str], **values: Any) -> None:
        self.__dict__.update(_real=real, _names=frozenset(names), **values)

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(f"this version has no {self._real}.{name}")
        return lambda *_, **__: None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise AttributeError(f"this version has no {self._real}.{name}")
        self.__dict__[name] = value


class Module:
    """`import tensorrt` of a version."""

    def __init__(self, version: str) -> None:
        self._names = VERSIONS[version]
        self.__version__ = f"{version}.0"
        self.layers: list[str] = []
        """The methods that made the last network's layers."""
        for name, members in self._names.items():
            if not hasattr(self, name) and not re.match("I[A-Z]", name):
                setattr(self, name, _Object(name, [], **{member: _Member(member) for member in members}))

    class ILogger:
        VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR = range(5)

    class IProgressMonitor:
        pass

    class IStreamWriter:
        pass

    @staticmethod
    def Weights(*_: Any) -> object:
        return object()

    @staticmethod
    def Permutation(axes: list[int]) -> list[int]:
        return axes

    def Builder(self, logger: Any) -> Any:
        def to_stream(network: Any, config: Any, writer: Any) -> bool:
            writer.write(b"a plan")
            return True

        def build(network: Any, config: Any) -> bytes:
            return b"a plan"

        made: dict[str, Any] = {
            "create_network": lambda flags: self._network(),
            "create_builder_config": lambda: self._made("IBuilderConfig"),
            "create_optimization_profile": lambda: self._made("IOptimizationProfile"),
            "build_serialized_network_to_stream": to_stream,
            "build_serialized_network": build,
        }
        return self._made("Builder", **{name: value for name, value in made.items() if name in self._names["Builder"]})

    def _made(self, real: str, **values: Any) -> _Object:
        return _Object(real, self._names[real], **values)

    def _network(self) -> _Object:
        self.layers.clear()

        def adder(method: str) -> Any:
            def add(*_: Any) -> Any:
                self.layers.append(method)
                return _Object("a layer", self._names["layers"], get_output=lambda index: self._tensor())

            return add

        methods = {name: adder(name) for name in self._names["INetworkDefinition"] if name.startswith("add_")}
        return self._made("INetworkDefinition", **{**methods, "add_input": lambda *_: self._tensor(), "num_layers": 0})

    def _tensor(self) -> _Object:
        return _Object("ITensor", [*self._names["ITensor"], "shape", "dtype", "name"], shape=(-1,) * 8, dtype=object())
