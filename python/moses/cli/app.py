"""The commands as one typer application, and a line of words run by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import typer

from moses.cli import growing, reading, running, surgery
from moses.cli.output import one_line
from moses.errors import ConfigError

# typer carries click inside itself in new versions and beside itself in older ones: either way these are its classes
ClickException = cast("type[Exception]", typer.BadParameter.__mro__[2])
Exit, Abort = typer.Exit, typer.Abort

app = typer.Typer(
    name="moses",
    help="Continual learning with experts that can be added, frozen, shared, pruned and extracted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help takes longer to import than most commands take to run
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
running.register(app)
growing.register(app)
reading.register(app)
surgery.register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        from moses.doctor import DISTRIBUTION, version_of

        typer.echo(f"moses {version_of(DISTRIBUTION) or 'of a source tree'}")
        raise typer.Exit


@app.callback()
def _root(
    debug: bool = typer.Option(False, "--debug", envvar="MOSES_DEBUG", help="Show the traceback of every error."),
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and end."
    ),
) -> None:
    """Hold the options that stand before the command."""


def run(words: Sequence[str]) -> int:
    """Run one command and return its exit code. Raises ConfigError where the line is not one."""
    command = typer.main.get_command(app)
    try:
        # not command.main(): it answers Ctrl-C and errors in its own words
        with command.make_context("moses", list(words)) as context:
            command.invoke(context)
    except Exit as ended:
        return ended.exit_code
    except Abort as error:
        raise KeyboardInterrupt from error
    except ClickException as error:
        raise ConfigError(_usage(error)) from error
    return 0


def _usage(error: BaseException) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "moses"
    return f"{one_line(message).rstrip('.')}; see '{command} --help'"
