"""Reading a file of `{"prompt", "answer"}` rows or of `{"text"}` rows, a JSON list or one JSON object a line, and naming the
line of a bad one.

Guarantees: a file that is damaged or hostile (too large, nested too deeply, no regular file, not UTF-8) is a
StreamError with the file and, where there is one, the line; nothing waits on a pipe; nothing is read before its size is
known to be allowed.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from moses.errors import StreamError
from moses.stream.task import Example, text_example

MAX_FILE_BYTES = 256 * 2**20  # TRACE's largest file has some tens of MiB
MAX_ROWS = 1_000_000  # a row costs some 300 bytes of Python objects besides its text

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def read_rows(path: Path) -> tuple[Example, ...]:
    """All rows of the file, in its order; extra fields are ignored. The first row says of which kind they are: a text to model
    where it has `text` and no `prompt`. Raises StreamError for an empty file or any bad row."""
    text = read_text(path)
    rows: list[Example] = []
    of_text = False
    for line, value in _values(path, text):
        if len(rows) == MAX_ROWS:
            _fail(path, line, f"more than {MAX_ROWS} rows: split the task", "too_many_rows")
        if not rows:
            of_text = isinstance(value, dict) and "text" in value and "prompt" not in value
        rows.append(_text(path, line, value) if of_text else _example(path, line, value))
    if not rows:
        raise StreamError(f"{path}: no rows: give at least one {{'prompt', 'answer'}} or {{'text'}}", code="empty_file")
    return tuple(rows)


def read_json(path: Path) -> Any:
    """The one JSON document of a file, under the same caps as `read_rows`."""
    text = read_text(path)
    value, end = _decode(path, text, _SPACE.match(text).end())  # type: ignore[union-attr]
    _expect_end(path, text, end)
    return value


def read_text(path: Path) -> str:
    """The text of a regular UTF-8 file of at most MAX_FILE_BYTES (a byte order mark is dropped)."""
    # without O_NONBLOCK, opening a pipe waits for ever
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StreamError(f"{path}: not a regular file: put a JSON file there", code="not_a_file")
        if status.st_size > MAX_FILE_BYTES:
            raise StreamError(
                f"{path}: {status.st_size} bytes, at most {MAX_FILE_BYTES} are read: split the task",
                code="file_too_large",
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_FILE_BYTES)
    finally:
        os.close(descriptor)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StreamError(
            f"{path}:{line}: byte {error.start} is not UTF-8: save the file as UTF-8", code="not_utf8"
        ) from None


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of each row; the line is the one on which the row begins, from 1."""
    position = _skip(text, 0)
    if position == len(text):
        return
    line = 1 + text.count("\n", 0, position)
    if text[position] == "{":
        while position < len(text):
            value, end = _decode(path, text, position)
            yield line, value
            following = _skip(text, end)
            if following < len(text) and "\n" not in text[end:following]:
                _fail(path, line, "two values on one line: give a JSON list, or one object a line", "bad_json")
            line += text.count("\n", position, following)
            position = following
        return
    if text[position] != "[":
        _fail(path, line, "neither a JSON list nor one object a line: give a list of {'prompt', 'answer'}", "bad_json")
    here = _skip(text, position + 1)
    if text[here : here + 1] == "]":
        _expect_end(path, text, here + 1)
        return
    while True:
        line += text.count("\n", position, here)
        value, end = _decode(path, text, here)
        yield line, value
        position, here = here, _skip(text, end)
        mark = text[here : here + 1]
        if mark == "]":
            _expect_end(path, text, here + 1)
            return
        if mark != ",":
            _fail(
                path,
                line + text.count("\n", position, here),
                "expected ',' or ']' after a row: mend the JSON",
                "bad_json",
            )
        here = _skip(text, here + 1)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _decode(path: Path, text: str, position: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        _fail(path, error.lineno, f"column {error.colno}: invalid JSON ({error.msg}): mend it there", "bad_json")
    except RecursionError:
        _fail(path, text.count("\n", 0, position) + 1, "JSON nested too deeply: a row is a flat object", "too_deep")
    except ValueError as error:  # an integer of thousands of digits
        _fail(path, text.count("\n", 0, position) + 1, f"invalid JSON ({error}): mend it there", "bad_json")


def _expect_end(path: Path, text: str, position: int) -> None:
    position = _skip(text, position)
    if position < len(text):
        _fail(path, text.count("\n", 0, position) + 1, "text after the end of the JSON: remove it", "bad_json")


def _example(path: Path, line: int, value: Any) -> Example:
    if not isinstance(value, dict):
        _fail(path, line, f"a row is a {_json_type(value)}: it must be an object with 'prompt' and 'answer'", "bad_row")
    return Example(_string(path, line, value, "prompt"), _string(path, line, value, "answer"))


def _text(path: Path, line: int, value: Any) -> Example:
    if not isinstance(value, dict):
        _fail(path, line, f"a row is a {_json_type(value)}: it must be an object with 'text', as the first", "bad_row")
    return text_example(_string(path, line, value, "text"))


def _string(path: Path, line: int, row: dict[str, Any], field: str) -> str:
    if field not in row:
        _fail(path, line, f"the row has no {field!r}: add it", "bad_row")
    value = row[field]
    if not isinstance(value, str):
        _fail(path, line, f"{field!r} is a {_json_type(value)}: it must be a string", "bad_row")
    if not value.strip():
        _fail(path, line, f"{field!r} is empty: fill it or remove the row", f"empty_{field}")
    try:
        value.encode()
    except UnicodeEncodeError:
        _fail(path, line, f"{field!r} has half of a surrogate pair: no tokenizer reads it, remove it", "bad_row")
    return value


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _fail(path: Path, line: int, problem: str, code: str) -> NoReturn:
    raise StreamError(f"{path}:{line}: {problem}", code=code)
