"""A click group whose commands are imported on use, and whose errors are one line."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
from click.exceptions import NoArgsIsHelpError

from llm_trm.errors import InputError, Interrupted, one_line


class UserError(click.ClickException):
    """An error that the user can fix: one line on stderr, exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"llm-trm: error: {self.format_message()}", err=True, file=file)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        raise UserError(" ".join(error.format_message().split()) + hint) from error
    except InputError as error:
        raise UserError(one_line(error, None)) from error
    except Interrupted as interrupted:
        click.echo(f"llm-trm: {interrupted}", err=True)
        raise click.exceptions.Exit(128 + interrupted.signal) from interrupted
    except KeyboardInterrupt as interrupted:
        click.echo("llm-trm: interrupted", err=True)
        raise click.exceptions.Exit(128 + signal.SIGINT) from interrupted


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

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _one_line_errors():
            return super().invoke(ctx)
