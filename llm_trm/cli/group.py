"""A click group whose commands are imported on use, and whose errors are one line."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from llm_trm.cli.expected_errors import expected, shortened_middle
from llm_trm.errors import Interrupted, signal_of
from llm_trm.signals import handling

#: Set to anything but 0, it shows the traceback of an error in addition to the line.
_DEBUG = "TRM_DEBUG"


class UserError(click.ClickException):
    """An error that the user can fix: one line on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        with suppress(OSError):  # stderr may be full or closed as well
            click.echo(f"llm-trm: error: {self.format_message()}", err=True, file=file)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (click.exceptions.Exit, click.Abort, NoArgsIsHelpError, UserError, BrokenPipeError):
        raise  # click ends quietly if the reader of a pipe is gone
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        line = shortened_middle(" ".join(error.format_message().split()))
        raise UserError(line + hint) from error
    except KeyboardInterrupt as interrupted:
        click.echo(f"llm-trm: {str(interrupted) or 'interrupted'}", err=True)
        raise click.exceptions.Exit(128 + signal_of(interrupted)) from interrupted
    except Exception as error:
        if (known := expected(error)) is None:
            raise
        if os.environ.get(_DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        raise UserError(known) from error


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: half-written files are removed, and one line says so."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # a choice that a launcher made stays
        yield
        return
    process = os.getpid()

    def terminate(number: int, _: FrameType | None) -> None:
        if os.getpid() != process:  # a forked worker, which its pool ends this way
            os._exit(128 + number)
        raise Interrupted(number, "terminated")

    with handling(terminate, signal.SIGTERM):
        yield


def _prepare_streams() -> None:
    """Standard streams that are closed take everything; open ones escape what their encoding lacks.

    cp1252, the default of a Windows pipe, has no Greek letters, for example. Escapes such as ``\\u03c0`` lose
    no part of an answer, and a path can still be told from another.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _flush_stdout() -> None:
    """Write what is buffered, while an error can still be reported."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python would try again at its exit.
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from error


class Group(click.Group):
    """Imports a command when it is used. ``commands_at`` maps its name to ``"module:attribute"``."""

    def __init__(self, *args: Any, commands_at: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands_at = commands_at or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *self.commands_at})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands_at:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.commands_at[cmd_name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`click.Command.main`; this is where the ``llm-trm`` process starts."""
        _prepare_streams()
        with _terminable():
            return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line_errors():
            result = super().invoke(ctx)
            _flush_stdout()
            return result
