"""Runs a command: prepares and parses its arguments, calls it, and turns every ending into an exit code.

A command's function only parses: it returns what is to be done as a function of a Console, which gives the exit code.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from trtllm.errors import GraphError, TrtllmError, UsageError
from trtllm.tools.arguments import OptionTable, flag_is_given, prepare
from trtllm.tools.console import A_BUG, Console
from trtllm.tools.retired_flags import RetiredFlag

Action = Callable[[Console], int]
"""What a command does, once its arguments are understood."""

INTERRUPTED = 130
TERMINATED = 143
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Terminated(BaseException):
    """The process was asked to end (SIGTERM); unwinds like KeyboardInterrupt, so that everything is cleaned up."""


def run(
    app: Any, name: str, arguments: Sequence[str] | None = None, *, retired: Mapping[str, RetiredFlag] | None = None
) -> int:
    """Runs a Typer app as command `name`; returns the exit code. Never raises, never prints a traceback unasked."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console = Console(name, json_output=flag_is_given(arguments, "--json"), level=_level(arguments))
    try:
        with _termination_raises():
            action = _parse(app, name, arguments, retired or {}, console)
            return action(console) if action is not None else 0
    except KeyboardInterrupt:
        return console.error("interrupted; nothing was left behind", "", INTERRUPTED)
    except Terminated:
        return console.error("terminated; nothing was left behind", "", TERMINATED)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except TrtllmError as error:
        hint = A_BUG if isinstance(error, GraphError) else error.hint
        return console.error(error.what, hint, error.exit_code, error)
    except MemoryError as error:
        return console.error("out of memory", "build on a larger machine, or bound it: --max-build-memory", 6, error)
    except OSError as error:
        return _report_os_error(console, error)
    except Exception as error:
        return console.error(f"{type(error).__name__}: {error}", A_BUG, 1, error)


def _parse(
    app: Any, name: str, arguments: Sequence[str], retired: Mapping[str, RetiredFlag], console: Console
) -> Action | None:
    """What the arguments ask for; None when they asked for help or the version, which is printed already."""
    import typer

    command = typer.main.get_command(app)
    prepared = prepare(arguments, OptionTable.of(command), retired)
    for note in prepared.notes:
        console.tell(f"warning: {note}", "warning")
    try:
        result = command.main(prepared.arguments, prog_name=name, standalone_mode=False)
    except Exception as error:
        raise _usage_error(error, name) from None
    return result if callable(result) else None


def _usage_error(error: Exception, name: str) -> Exception:
    """The parser's own error as ours. Its class belongs to a library inside Typer: only its face is known."""
    describe = getattr(error, "format_message", None)
    if describe is None:
        return error
    return UsageError(str(describe()).rstrip("."), f"{name} --help lists the options")


def _level(arguments: Sequence[str]) -> str:
    """debug when tracebacks were asked for: the errors of parsing need to know before there is a parse."""
    text = " ".join(arguments).replace("_", "-").replace("=", " ")
    return "debug" if "--log-level debug" in text else "info"


def _report_os_error(console: Console, error: OSError) -> int:
    where = f" {error.filename}" if error.filename else ""
    if error.errno in _DISK_FULL:
        return console.error(f"the disk is full:{where} {error.strerror}", "free space, or write elsewhere", 6, error)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return console.error(f"cannot write{where}: {error.strerror}", "choose another place", 2, error)
    return console.error(f"{type(error).__name__}: {error}", A_BUG, 1, error)


@contextlib.contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM raises Terminated in the main thread while the block runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
