"""What trtllm-inspect found, as tables for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trtllm.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import Group

    from trtllm.compiler.inspection.contents import Contents


def print_contents(
    found: Contents, console: RichConsole, *, weights: bool = False, recipes: bool = False, graph: bool = False
) -> None:
    """Prints a summary, and the tables that were asked for."""
    console.print(_summary(found))
    console.print(_kinds_of_weights(found))
    if found.graph is not None:
        console.print(_operators(found) if not graph else _layers(found))
    if found.errors is not None:
        console.print(_errors(found))
    if weights:
        console.print(_weights(found))
    if recipes:
        console.print(_recipes(found))
    if graph:
        console.print(_table("graph inputs and outputs", "", "", rows=_io(found)))
    for note in found.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _table(title: str, *columns: str, rows: Iterator[tuple[str, ...]]) -> Group:
    """A title and a table whose columns with a trailing ">" are aligned to the right."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=any(columns), box=None, pad_edge=False)
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return Group(Text(title, style="bold"), table)


def _summary(found: Contents) -> Group:
    def rows() -> Iterator[tuple[str, ...]]:
        from trtllm.compiler.inspection.contents import weights_line

        yield "kind", f"{found.kind}, {found.format}"
        if found.architecture:
            yield "architecture", found.architecture
        yield "state", found.state
        yield "weights", weights_line(found)
        if found.versions:
            yield "versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())
        if found.memory is not None and found.cache.get("groups"):
            plan = found.memory
            groups = ", ".join(_group(group["window"], len(group["layers"])) for group in found.cache.get("groups", ()))
            yield "cache", f"{format_size(plan.cache_per_token)} per token: {groups or 'no layers'}"
            limits = f"{plan.max_batch_size} x {plan.max_seq_len} tokens"
            total = plan.weights + plan.cache_at_limits
            yield (
                "at the limits",
                f"{format_size(plan.cache_at_limits)} of cache for {limits}, {format_size(total)} in all",
            )
        for name, values in (("build", found.build), ("model", found.model)):
            shown = {key: value for key, value in values.items() if value not in (None, [], {}, "")}
            if shown:
                yield name, ", ".join(f"{key}={_plain(value)}" for key, value in sorted(shown.items()))
        if found.files:
            yield "files", ", ".join(f"{name} ({format_size(size)})" for name, size in found.files.items())

    return _table(found.path, "", "", rows=rows())


def _group(window: int, layers: int) -> str:
    return f"{layers} layers that see {f'the last {window} tokens' if window else 'everything'}"


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


def _kinds_of_weights(found: Contents) -> Group:
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for weight in found.weights:
        key = (weight.dtype, weight.quantization or "")
        counts[key] += 1
        sizes[key] += weight.nbytes
    rows = ((*key, str(counts[key]), format_size(size)) for key, size in sizes.most_common())
    size = "size as read>" if found.kind == "checkpoint" else "size>"
    return _table("\nweights by type", "type", "quantization", "count>", size, rows=rows)


def _operators(found: Contents) -> Group:
    assert found.graph is not None
    rows = ((kind, str(count)) for kind, count in found.graph.kinds.items())
    return _table("\noperators", "kind", "count>", rows=rows)


def _layers(found: Contents) -> Group:
    assert found.graph is not None
    rows = (
        (box.title if index == 0 else "", operator.kind, operator.name, format_size(operator.nbytes))
        for box in found.graph.boxes
        for index, operator in enumerate(box.operators)
    )
    return _table("\ngraph", "layer", "operator", "name", "weights>", rows=rows)


def _errors(found: Contents) -> Group:
    assert found.errors is not None
    rows = ((layer, f"{error:.3%}") for layer, error in found.errors.by_layer.items())
    return _table(f"\nquantization error against {found.errors.reference}", "layer", "relative rms>", rows=rows)


def _weights(found: Contents) -> Group:
    rows = (
        (
            weight.name, "x".join(map(str, weight.shape)), weight.dtype, weight.quantization or "",
            format_size(weight.nbytes), weight.sha256[:12], "" if weight.state == "held" else weight.state,
        )
        for weight in found.weights
    )  # fmt: skip
    return _table("\nweights", "name", "shape", "type", "quantization", "size>", "sha256", "", rows=rows)


def _recipes(found: Contents) -> Group:
    rows = ((weight.name, weight.recipe or "as stored") for weight in found.weights)
    return _table("\nrecipes", "weight", "made of", rows=rows)


def _io(found: Contents) -> Iterator[tuple[str, ...]]:
    yield from (("input", text) for text in found.inputs)
    yield from (("output", text) for text in found.outputs)
