"""Renders chat templates as transformers does: Jinja in a sandbox, since templates are code that others wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from trtllm.errors import UsageError

Message = Mapping[str, Any]
_MESSAGE_SHAPE = 'pass a list such as [{"role": "user", "content": "Hello"}]'
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys that hold a message's reasoning; templates read the first (gpt-oss the second)."""


class ChatTemplates:
    """The templates of one engine by name; "tool_use" is taken for tools, "default" otherwise."""

    def __init__(self, directory: Path, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._directory = directory
        self._templates = templates
        self._special_tokens = special_tokens

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        extra: Mapping[str, Any],
    ) -> str:
        """The conversation as text. Raises UsageError, also with what the template itself objects to."""
        import jinja2

        template = self._template(has_tools=tools is not None)
        values = {
            "messages": [_checked_message(message) for message in _checked_sequence(messages)],
            "tools": None if tools is None else [_checked_tool(tool) for tool in tools],
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
            **_plain(extra),
        }
        try:
            return _compiled(template).render(values)
        except jinja2.TemplateSyntaxError as error:
            fault = f"is no valid template: {error.message} at line {error.lineno}"
            raise UsageError(f"the chat template of {self._directory} {fault}", "repair chat_template.jinja") from None
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template refuses the messages: {error}", _MESSAGE_SHAPE) from None
        except (TypeError, KeyError, AttributeError, ValueError, ZeroDivisionError, IndexError) as error:
            raise UsageError(f"the chat template fails on these messages: {error}", _MESSAGE_SHAPE) from None

    def _template(self, *, has_tools: bool) -> str:
        name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name in self._templates:
            return self._templates[name]
        if self._templates:
            names = ", ".join(sorted(self._templates))
            raise UsageError(
                f"{self._directory} has no default chat template, it has: {names}", "render the text yourself"
            )
        raise UsageError(
            f"{self._directory} has no chat template", "its model is no chat model: use generate with a plain prompt"
        )


def _checked_sequence(messages: Any) -> Sequence[Any]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f"messages are a {type(messages).__name__}, expected a list", _MESSAGE_SHAPE)
    if not messages:
        raise UsageError("there are no messages", _MESSAGE_SHAPE)
    return messages


def _checked_message(message: Any) -> dict[str, Any]:
    """A plain copy without keys that are None, which many templates would print."""
    if not isinstance(message, Mapping):
        raise UsageError(f"a message is a {type(message).__name__}, expected a dict", _MESSAGE_SHAPE)
    if not isinstance(message.get("role"), str):
        raise UsageError(f"a message has no 'role': {str(dict(message))[:60]}", _MESSAGE_SHAPE)
    plain: dict[str, Any] = _plain({key: value for key, value in message.items() if value is not None})
    reasoning = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _checked_tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise UsageError(
            f"a tool is a {type(tool).__name__}, expected a JSON schema",
            'pass {"type": "function", "function": {"name": ..., "parameters": ...}}',
        )
    plain: dict[str, Any] = _plain(tool)
    return plain


def _plain(value: Any) -> Any:
    """`value` of JSON types alone, so that a template meets no object with methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [*map(_plain, value)]
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return f"<{type(value).__name__}>"


@cache
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@cache
def _environment() -> Any:
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals["namespace"] = _namespace_class()
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _generation_tag() -> Any:
    """`{% generation %}`, which marks what the assistant wrote: of use in training, plain text here."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationTag


def _namespace_class() -> Any:
    """Jinja's `namespace`, without names that begin with an underscore: they would reach into the interpreter."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class TemplateNamespace(Namespace):
        def __init__(*args: Any, **values: Any) -> None:
            self, *rest = args
            attributes = dict(*rest, **values)
            for name in attributes:
                _check_name(name)
            Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: str) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a chat template cannot set {name!r} on a namespace")

    return TemplateNamespace
