"""Frozen records of what users ask for, checked where they are made: names, types and ranges, without pydantic.

    @record
    class Params:
        max_tokens: int = setting(default=32, at_least=1)
        stop: str | list[str] | None = None

`Params(max_token=3)` raises UsageError with the nearest name; wrong values raise one UsageError that lists them all.
A class may add rules over several fields in a method `problems`.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from trtllm.errors import UsageError, nearest

if TYPE_CHECKING:
    from typing import dataclass_transform
else:  # Python 3.10 has none, and none is needed to run

    def dataclass_transform(**options):
        """What types are checked by."""
        return lambda decorator: decorator


T = TypeVar("T")
_NOT = object()
"""What `_converted` gives for a value of another type."""


@dataclasses.dataclass(frozen=True)
class _Range:
    at_least: float | None
    at_most: float | None
    above: float | None


_ANY = _Range(None, None, None)


def setting(
    *, default: Any, at_least: float | None = None, at_most: float | None = None, above: float | None = None
) -> Any:
    """A field whose numbers, also those in a list, lie in a range; None is never out of range."""
    return dataclasses.field(default=default, metadata={"range": _Range(at_least, at_most, above)})


@dataclass_transform(frozen_default=True, field_specifiers=(setting, dataclasses.field))
def record(cls: type[T]) -> type[T]:
    """A frozen dataclass whose constructor raises UsageError for unknown names and for values that do not fit."""
    made = dataclasses.dataclass(frozen=True)(cls)
    plain_init: Any = vars(made)["__init__"]

    def __init__(self: Any, *args: Any, **values: Any) -> None:
        check_names(cls.__name__, values, field_names(made))
        try:
            plain_init(self, *args, **values)
        except TypeError as error:
            raise UsageError(f"{cls.__name__}: {str(error).partition(') ')[2] or error}", "") from None
        problems = [*_convert_fields(self)] or [*getattr(self, "problems", tuple)()]
        if problems:
            raise UsageError(f"{cls.__name__}: {'; '.join(problems)}", "docs/llm-api.md lists types and ranges")

    setattr(made, "__init__", __init__)  # noqa: B010  # mypy refuses to see a method replaced
    return made


def field_names(cls: Any) -> list[str]:
    """The names of a record's fields."""
    return [field.name for field in dataclasses.fields(cls)]


def check_names(what: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises UsageError that names every key of `values` which is not known, with the nearest known name."""
    unknown = [nearest(name, known) for name in values if name not in known]
    if unknown:
        raise UsageError(f"{what} has no argument {', '.join(unknown)}", "docs/llm-api.md lists them")


def _convert_fields(instance: Any) -> Iterator[str]:
    """Replaces values by their plain forms (a numpy integer by an int), and yields what is wrong."""
    hints = _hints(instance.__class__)
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if value is field.default:
            continue
        converted = _converted(value, hints[field.name])
        if converted is _NOT:
            yield f"{field.name} is {_shown(value)}, expected {_type_name(hints[field.name])}"
            continue
        object.__setattr__(instance, field.name, converted)
        allowed = field.metadata.get("range", _ANY)
        numbers = converted if isinstance(converted, list) else [converted]
        wrong = next((number for number in numbers if _is_outside(number, allowed)), None)
        if wrong is not None:
            yield f"{field.name} is {_shown(wrong)}, must be {_range_text(allowed)}"


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _converted(value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` names, or _NOT."""
    origin = typing.get_origin(hint)
    if hint is Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        options = (_converted(value, option) for option in typing.get_args(hint))
        return next((option for option in options if option is not _NOT), _NOT)
    if origin is typing.Literal:
        return value if value in typing.get_args(hint) else _NOT
    if origin is list:
        return _converted_items(value, typing.get_args(hint)[0])
    if origin in (dict, collections.abc.Mapping):
        return _converted_mapping(value, *typing.get_args(hint))
    if origin is collections.abc.Callable:
        return value if callable(value) else _NOT
    return _converted_scalar(value, origin or hint)


def _converted_items(value: Any, item: Any) -> Any:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        return _NOT
    items = [_converted(element, item) for element in value]
    return _NOT if any(element is _NOT for element in items) else items


def _converted_mapping(value: Any, key: Any, item: Any) -> Any:
    if not isinstance(value, Mapping):
        return _NOT
    pairs = [(_converted(name, key), _converted(element, item)) for name, element in value.items()]
    return _NOT if any(_NOT in pair for pair in pairs) else dict(pairs)


def _converted_scalar(value: Any, kind: Any) -> Any:
    if kind is bool:
        return value if isinstance(value, bool) else _NOT
    if kind is int:
        return int(value) if hasattr(value, "__index__") and not isinstance(value, bool) else _NOT
    if kind is float:
        number = hasattr(value, "__float__") and not isinstance(value, bool | str)
        return float(value) if number and getattr(value, "shape", ()) == () else _NOT
    if kind is type(None):
        return None if value is None else _NOT
    return value if isinstance(value, kind) else _NOT


def _is_outside(value: Any, allowed: _Range) -> bool:
    if not isinstance(value, int | float):
        return False
    return (
        math.isnan(value)
        or (allowed.at_least is not None and value < allowed.at_least)
        or (allowed.at_most is not None and value > allowed.at_most)
        or (allowed.above is not None and value <= allowed.above)
    )


def _range_text(allowed: _Range) -> str:
    words = ("at least", allowed.at_least), ("above", allowed.above), ("at most", allowed.at_most)
    return " and ".join(f"{word} {bound:g}" for word, bound in words if bound is not None) or "a number"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        return "None" if hint is type(None) else hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "").replace("NoneType", "None")
