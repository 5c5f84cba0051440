"""Writes what an inspection found as one HTML page: no script, no network, nothing beside the file itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from importlib import resources

from trtllm.compiler.inspection.contents import Contents, WeightRecord, numbered_together, weights_line
from trtllm.compiler.inspection.graph import Box, Operator
from trtllm.sizes import format_size

STYLE = "page.css"
_LEGEND = (
    '<p class="legend"><span class="bar size"></span> weights <span class="bar cache"></span> cache at the limits</p>'
)


def page(found: Contents) -> str:
    """The whole document."""
    style = resources.files("trtllm.compiler.inspection").joinpath(STYLE).read_text(encoding="utf-8")
    title = escape(f"{found.kind} {found.path}")
    body = "\n".join(
        section
        for section in (
            _summary(found), _memory(found), _graph(found), _errors(found), _sizes(found), _weights(found),
            _config("Build", found.build), _config("Model", found.model), _notes(found),
        )
        if section
    )  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{style}</style>\n</head>\n'
        f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    name = title.lower().replace(" ", "-")
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{content}\n</section>' if content else ""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells are HTML already; those of columns whose head ends with ">" are numbers."""
    columns = list(head)
    numeric = [column.endswith(">") for column in columns]
    cells = "".join(
        f"<th{_number(is_number)}>{escape(column.rstrip('>'))}</th>"
        for column, is_number in zip(columns, numeric, strict=True)
    )
    lines = [
        "<tr>"
        + "".join(f"<td{_number(is_number)}>{cell}</td>" for cell, is_number in zip(row, numeric, strict=True))
        + "</tr>"
        for row in rows
    ]
    return f"<table><thead><tr>{cells}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table>"


def _number(is_number: bool) -> str:
    return ' class="n"' if is_number else ""


def _bar(value: float, largest: float, kind: str = "size") -> str:
    width = 100 * value / largest if largest else 0
    return f'<span class="track"><span class="bar {kind}" style="width:{width:.2f}%"></span></span>'


def _summary(found: Contents) -> str:
    facts = {
        "format": found.format,
        "architecture": found.architecture,
        "state": found.state,
        "weights": weights_line(found),
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "files": ", ".join(f"{name} ({format_size(size)})" for name, size in found.files.items()),
        "inputs": "; ".join(numbered_together(found.inputs)),
        "outputs": "; ".join(numbered_together(found.outputs)),
        "passes": ", ".join(f"{name} {count}" for name, count in found.passes.items() if count),
    }
    return _section("Summary", _definitions(facts))


def _definitions(facts: dict[str, str]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(text)}</dd>" for key, text in facts.items() if text)
        + "</dl>"
    )


def _memory(found: Contents) -> str:
    plan = found.memory
    if plan is None:
        return ""
    total = plan.weights + plan.cache_at_limits
    share = 100 * plan.weights / total if total else 0
    bar = (
        f'<div class="stack"><span class="bar size" style="width:{share:.2f}%"></span>'
        f'<span class="bar cache" style="width:{100 - share:.2f}%"></span></div>'
    )
    groups = found.cache.get("groups", ())
    if not groups:
        return _section("Memory", bar + _definitions({"weights": format_size(plan.weights), "cache": "none"}))
    facts = {
        "weights": format_size(plan.weights),
        "cache per token": format_size(plan.cache_per_token),
        "cache at the limits": f"{format_size(plan.cache_at_limits)}: {plan.max_batch_size} sequences of "
        f"{plan.max_seq_len} tokens",
        "together": format_size(total),
    }
    for group in groups:
        window = f"the last {group['window']} tokens" if group["window"] else "everything"
        layers = f"{len(group['layers'])} layers that see {window}"
        facts[layers] = f"{format_size(group['bytes_per_token'])} per token"
    return _section("Memory", f"{_LEGEND}{bar}{_definitions(facts)}")


def _graph(found: Contents) -> str:
    if found.graph is None:
        return ""
    largest = max((box.nbytes for box in found.graph.boxes), default=0)
    kinds = ", ".join(f"{kind} {count}" for kind, count in found.graph.kinds.items())
    errors = found.errors.by_layer if found.errors is not None else {}
    worst = max(errors.values(), default=0.0)
    boxes = "\n".join(
        _box(box, largest, errors.get(box.title.removeprefix("layer ")), worst, is_open=box.title == "layer 0")
        for box in found.graph.boxes
    )
    return _section("Graph", f"<p>{escape(kinds)}</p>\n{boxes}")


def _box(box: Box, largest: int, error: float | None, worst: float, *, is_open: bool) -> str:
    """A layer in one line of columns, and its operators below, each with what it reads."""
    widest = max((operator.nbytes for operator in box.operators), default=0)
    inner = "\n".join(_operator(item, widest) for item in box.operators)
    rounding = f"<span>error {error:.2%}</span>{_bar(error, worst, 'error')}" if error is not None else ""
    count = f"{len(box.operators)} operator{'s' if len(box.operators) > 1 else ''}"
    return (
        f'<details class="layer"{" open" if is_open else ""}><summary><span>{escape(box.title)}</span>'
        f"<span>{count}</span><span>{format_size(box.nbytes)}</span>{_bar(box.nbytes, largest)}{rounding}"
        f"</summary>\n{inner}\n</details>"
    )


def _operator(item: Operator, widest: int) -> str:
    size = f' <span class="size">{format_size(item.nbytes)}</span> {_bar(item.nbytes, widest)}' if item.nbytes else ""
    reads = f'<div class="weight">reads {escape(", ".join(item.reads))}</div>' if item.reads else ""
    weights = "".join(f'<div class="weight"><code>{escape(name)}</code></div>' for name in item.weights)
    return f'<div class="op"><b>{escape(item.kind)}</b> <code>{escape(item.name)}</code>{size}{reads}{weights}</div>'


def _errors(found: Contents) -> str:
    if found.errors is None:
        return ""
    by_layer = found.errors.by_layer
    largest = max(by_layer.values(), default=0.0)
    rows = ((escape(layer), f"{error:.3%}", _bar(error, largest, "error")) for layer, error in by_layer.items())
    text = f"<p>Root mean square of the error over that of the weights, against {escape(found.errors.reference)}.</p>"
    if found.errors.unknown:
        text += f"<p>Not measured: {escape(', '.join(found.errors.unknown))}.</p>"
    return _section("Quantization error", text + _table(("layer", "relative rms>", ""), rows))


def _sizes(found: Contents) -> str:
    """Bytes of the weights of each layer."""
    sizes: dict[str, int] = {}
    for weight in found.weights:
        key = "outside" if weight.layer is None else f"layer {weight.layer}"
        sizes[key] = sizes.get(key, 0) + weight.nbytes
    largest = max(sizes.values(), default=0)
    rows = ((escape(key), format_size(size), _bar(size, largest)) for key, size in sizes.items())
    return _section("Weights by layer", _table(("layer", "size>", ""), rows))


def _weights(found: Contents) -> str:
    largest = max((weight.nbytes for weight in found.weights), default=0)
    errors = {item.name: item.relative_rms for item in found.errors.weights} if found.errors is not None else {}
    head = ("name and recipe", "shape", "type", "size>", "", "error>", "sha256", "state")
    rows = (tuple(_weight_cells(weight, largest, errors.get(weight.name))) for weight in found.weights)
    summary = f"<summary>{len(found.weights)} weights</summary>"
    return _section("Weights", f"<details>{summary}\n{_table(head, rows)}\n</details>")


def _weight_cells(weight: WeightRecord, largest: int, error: float | None) -> Iterator[str]:
    recipe = f'<div class="recipe">{escape(weight.recipe)}</div>' if weight.recipe else ""
    yield f"<code>{escape(weight.name)}</code>{recipe}"
    yield "×".join(map(str, weight.shape))
    yield escape(weight.dtype + (f", {weight.quantization}" if weight.quantization else ""))
    yield format_size(weight.nbytes)
    yield _bar(weight.nbytes, largest)
    yield f"{error:.3%}" if error is not None else ""
    yield f'<code title="{weight.sha256}">{weight.sha256[:12]}</code>'
    yield escape(weight.state)


def _config(title: str, values: object) -> str:
    assert isinstance(values, dict)
    shown = {str(key): str(value) for key, value in sorted(values.items()) if value not in (None, [], {}, "")}
    return _section(title, _definitions(shown) if shown else "")


def _notes(found: Contents) -> str:
    return _section("Notes", "".join(f"<p>{escape(note)}</p>" for note in found.notes))
