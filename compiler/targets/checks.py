"""Says everything that a target cannot do of a build, at once, before anything is emitted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from trtllm.compiler.ir.capabilities import TARGET_OPTIONS, Capabilities
from trtllm.compiler.ir.weights import DTYPES
from trtllm.config import BuildConfig
from trtllm.errors import UnsupportedModelError, UsageError

SHOWN_NODES = 3
"""Nodes named for each operator that a target lacks."""


def check_options(build: BuildConfig, capabilities: Capabilities) -> None:
    """Raises UsageError that lists every option of the build that the target does not honour."""
    problems = [problem for name in TARGET_OPTIONS for problem in _option_problems(name, build, capabilities)]
    problems += _scheme_problems(build, capabilities)
    if problems:
        known = ", ".join(sorted(capabilities.options)) or "none of " + ", ".join(TARGET_OPTIONS)
        raise UsageError(
            f"target {capabilities.target} cannot build this: {'; '.join(problems)}",
            f"leave the option out, or choose another --target; {capabilities.target} takes {known}",
        )


def _scheme_problems(build: BuildConfig, capabilities: Capabilities) -> Iterator[str]:
    needed = capabilities.scheme_capabilities.get(build.quantization or "", 0)
    for name in build.compute_capabilities:
        if name.isdigit() and int(name) < needed:
            yield f"{build.quantization} needs compute capability {needed}, {name} has no products in its format"


def _option_problems(name: str, build: BuildConfig, capabilities: Capabilities) -> Iterator[str]:
    given = getattr(build, name)
    if given == BuildConfig.model_fields[name].default:
        return
    if name not in capabilities.options:
        yield f"it takes no {name}" + _because(name, capabilities)
        return
    allowed = capabilities.options[name]
    for value in given if isinstance(given, tuple) else (given,):
        if allowed is not None and str(value) not in allowed:
            listed = ", ".join(sorted(allowed, key=lambda item: (len(item), item)))
            yield f"{name} {value} is none of {listed}" + _because(f"{name} {value}", capabilities)


def _because(key: str, capabilities: Capabilities) -> str:
    return f" ({capabilities.refusals[key]})" if key in capabilities.refusals else ""


def check_graph(graph: ir.Graph, capabilities: Capabilities) -> None:
    """Raises UnsupportedModelError that lists every operator, type and shape that the target cannot run."""
    problems = [
        *_operator_problems(graph, capabilities),
        *_type_problems(graph, capabilities),
        *_shape_problems(graph, capabilities),
    ]
    if problems:
        raise UnsupportedModelError(
            f"target {capabilities.target} cannot run this graph: {'; '.join(problems)}",
            "choose another --target, --dtype or --quantization, or report the model",
        )


def _operator_problems(graph: ir.Graph, capabilities: Capabilities) -> Iterator[str]:
    if not capabilities.lists_every_operator:
        return
    missing: dict[str, list[str]] = {}
    for node in graph:
        if not capabilities.has(node.op_type, node.domain):
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            missing.setdefault(operator, []).append(node.name or f"the maker of {node.outputs[0].name}")
    for operator, nodes in missing.items():
        yield f"it has no operator {operator} ({_first(nodes)})"


def _first(names: list[str]) -> str:
    rest = len(names) - SHOWN_NODES
    return ", ".join(names[:SHOWN_NODES]) + (f" and {rest} more" if rest > 0 else "")


def _type_problems(graph: ir.Graph, capabilities: Capabilities) -> Iterator[str]:
    if capabilities.value_dtypes is None:
        return
    for value in _values(graph):
        if value.dtype is not None and DTYPES.get(value.dtype) not in capabilities.value_dtypes:
            yield f"'{value.name}' is {value.dtype}, a type it does not have"


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from (value for value in node.outputs if value.name != "")


def _shape_problems(graph: ir.Graph, capabilities: Capabilities) -> Iterator[str]:
    for value in graph.inputs:
        for axis, extent in enumerate(value.shape or ()):
            if isinstance(extent, int):
                continue
            if capabilities.static_cache and axis == 2 and value.name and value.name.startswith("past_"):
                yield f"the cache '{value.name}' has no constant length"
            elif capabilities.symbols is not None and extent.value not in capabilities.symbols:
                yield f"extent {axis} of input '{value.name}' varies by '{extent.value}', which has no range"
