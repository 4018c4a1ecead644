"""The command line. It imports typer and nothing heavier; a command imports what it needs when it runs.

Exit codes: 0 done; 1 the work found a problem; 2 wrong usage or bad input, with one line on stderr; 130 interrupted;
70 a bug in moses, with its traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import typer

from moses.cli import growing, reading, running, surgery
from moses.cli.output import one_line
from moses.errors import MosesError

__all__ = ["app", "main"]

USAGE = 2
BUG = 70
INTERRUPTED = 130
PIPE_CLOSED = 141

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process by default."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # the option may be what is wrong, so it is looked for before the line is understood
    debug = "--debug" in words or os.environ.get("MOSES_DEBUG", "").lower() in ("1", "true", "yes", "on")
    try:
        if _is_plain_inspect(words):
            # building every command and the schemas of their options takes longer than reading a checkpoint's headers
            path = next(word for word in words[1:] if word != "--json")
            reading.inspect(Path(path), as_json="--json" in words)
        else:
            command = typer.main.get_command(app)
            # not command.main(): it answers Ctrl-C and errors in its own words
            with command.make_context("moses", words) as context:
                command.invoke(context)
        sys.stdout.flush()
    except Exit as ended:
        return ended.exit_code
    except KeyboardInterrupt:
        return _failed(INTERRUPTED, _interrupted(words), debug)
    except Abort:
        return _failed(INTERRUPTED, "interrupted", debug)
    except ClickException as error:
        return _failed(USAGE, f"error: {_usage(error)}", debug)
    except BrokenPipeError:
        # whoever read our output (head, less) has enough; python must not complain about it when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except MosesError as error:
        return _failed(USAGE, f"error: {error}", debug)
    except OSError as error:
        return _failed(USAGE, f"error: {_system(error)}", debug)
    except Exception as error:
        traceback.print_exc()
        print(f"error: this is a bug in moses: {one_line(f'{type(error).__name__}: {error}')}", file=sys.stderr)
        return BUG
    return 0


def _is_plain_inspect(words: Sequence[str]) -> bool:
    """Whether the line is `inspect PATH`, with or without `--json`."""
    rest = [word for word in words[1:] if word != "--json"]
    return words[0] == "inspect" and len(words) < 4 and len(rest) == 1 and not rest[0].startswith("-")


def _failed(code: int, line: str, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(one_line(line), file=sys.stderr)
    return code


def _usage(error: BaseException) -> str:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "moses"
    return f"{one_line(message).rstrip('.')}; see '{command} --help'"


def _system(error: OSError) -> str:
    if error.filename is None or error.strerror is None:
        return str(error)
    mends = {
        FileNotFoundError: "check the path",
        NotADirectoryError: "give a folder",
        IsADirectoryError: "give a file",
        PermissionError: "check who may read and write it",
        FileExistsError: "choose another path",
    }
    mend = next((mend for kind, mend in mends.items() if isinstance(error, kind)), "check the disk")
    return f"{error.filename}: {error.strerror.lower()}; {mend}"


def _interrupted(words: Sequence[str]) -> str:
    if "train" in words:
        return "interrupted: what was finished is in the run folder; the same command with --resume goes on"
    return "interrupted"
