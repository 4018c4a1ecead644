"""The command line. A command imports what it needs when it runs, and `inspect PATH` not even typer.

Exit codes: 0 done; 1 the work found a problem; 2 wrong usage or bad input, with one line on stderr; 130 interrupted;
70 a bug in moses, with its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from moses.cli.output import one_line
from moses.errors import MosesError

__all__ = ["main"]

USAGE = 2
BUG = 70
INTERRUPTED = 130
PIPE_CLOSED = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `arguments` are those of the process by default."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    # the option may be what is wrong, so it is looked for before the line is understood
    debug = "--debug" in words or os.environ.get("MOSES_DEBUG", "").lower() in ("1", "true", "yes", "on")
    try:
        if _is_plain_inspect(words):
            # importing typer and building every command takes longer than reading a checkpoint's headers
            from moses.cli.show import inspect

            inspect(Path(next(word for word in words[1:] if word != "--json")), as_json="--json" in words)
            code = 0
        else:
            from moses.cli.app import run

            code = run(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed(INTERRUPTED, _interrupted(words), debug)
    except BrokenPipeError:
        # whoever read our output (head, less) has enough; python must not complain about it when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except MosesError as error:
        return _failed(USAGE, f"error: {error}", debug)
    except OSError as error:
        return _failed(USAGE, f"error: {_system(error)}", debug)
    except Exception as error:
        import traceback

        traceback.print_exc()
        print(f"error: this is a bug in moses: {one_line(f'{type(error).__name__}: {error}')}", file=sys.stderr)
        return BUG
    return code


def _is_plain_inspect(words: Sequence[str]) -> bool:
    """Whether the line is `inspect PATH`, with or without `--json`."""
    rest = [word for word in words[1:] if word != "--json"]
    return words[0] == "inspect" and len(words) < 4 and len(rest) == 1 and not rest[0].startswith("-")


def _failed(code: int, line: str, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(one_line(line), file=sys.stderr)
    return code


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
