"""Prepares a command line for its parser: one spelling of options, retired flags out, unknown ones refused by name.

`--max_batch_size` and `--max-batch-size` are the same option. Only options are respelled, never their values, and
nothing after `--`. It knows a command by its parser's own table and so serves every command.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trtllm.errors import UsageError, nearest
from trtllm.tools.retired_flags import RetiredFlag

END_OF_OPTIONS = "--"


@dataclass(frozen=True)
class OptionTable:
    """What a parser knows: each option by each of its names, and whether a value follows it."""

    takes_value: Mapping[str, bool]

    @classmethod
    def of(cls, command: Any) -> OptionTable:
        """The options of a Typer command, and of its subcommands."""
        found = {"--help": False}
        for known in _with_subcommands(command):
            for parameter in known.params:
                names = [*parameter.opts, *parameter.secondary_opts]
                takes_value = not (getattr(parameter, "is_flag", False) or getattr(parameter, "count", False))
                found |= {name: takes_value for name in names if name.startswith("-")}
        return cls(found)


@dataclass
class Prepared:
    """Arguments for the parser, and what the user should be told about those that are gone."""

    arguments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(arguments: Sequence[str], table: OptionTable, retired: Mapping[str, RetiredFlag]) -> Prepared:
    """Raises UsageError for options that nobody knows, all at once, and for retired ones that asked for something."""
    prepared, unknown = Prepared(), []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        following = arguments[position + 1] if position + 1 < len(arguments) else None
        if argument == END_OF_OPTIONS:
            prepared.arguments += arguments[position:]
            break
        position += 1
        if not argument.startswith("-") or argument == "-":
            prepared.arguments.append(argument)
            continue
        name, separator, value = _spelled(argument, table)
        if name in table.takes_value:
            prepared.arguments.append(name + separator + value)
            if table.takes_value[name] and not separator and following is not None:
                prepared.arguments.append(following)
                position += 1
        elif name in retired:
            given = value if separator else _retired_value(retired[name], following)
            position += not separator and given is not None
            prepared.notes.append(retired[name].note(name, given))
        else:
            unknown.append(nearest(name, [*table.takes_value, *retired]))
    if unknown:
        raise UsageError(f"unknown option {', '.join(unknown)}", "--help lists the options")
    return prepared


def flag_is_given(arguments: Sequence[str], name: str) -> bool:
    """Whether a flag without value stands among the arguments, in either spelling."""
    before_end = list(arguments)[: arguments.index(END_OF_OPTIONS)] if END_OF_OPTIONS in arguments else arguments
    return any(argument.replace("_", "-") == name for argument in before_end)


def _with_subcommands(command: Any) -> Iterator[Any]:
    yield command
    for child in getattr(command, "commands", {}).values():
        yield from _with_subcommands(child)


def _spelled(argument: str, table: OptionTable) -> tuple[str, str, str]:
    """Name, "=" (or "" where no value is attached) and value: "--dtype=x", "-O2", "--dtype"."""
    if not argument.startswith("--"):
        short = argument[:2]
        attached = len(argument) > 2 and table.takes_value.get(short, False)
        return (short, "", argument[2:]) if attached else (argument, "", "")
    name, separator, value = argument.partition("=")
    return name.replace("_", "-"), separator, value


def _retired_value(flag: RetiredFlag, following: str | None) -> str | None:
    return following if flag.takes_value and following is not None and not following.startswith("-") else None
