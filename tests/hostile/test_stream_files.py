"""Files of rows that are damaged or meant to hurt: a typed error with the file and the line, at once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moses.errors import StreamError
from moses.stream import rows as rows_module
from moses.stream.rows import read_json, read_rows
from moses.stream.task import Example

GOOD = '{"prompt": "p", "answer": "a"}'

BAD_FILES: dict[str, tuple[bytes, int | None, str, str]] = {
    "empty": (b"", None, "empty_file", "no rows"),
    "only blanks": (b" \n\t", None, "empty_file", "no rows"),
    "empty list": (b"[ ]", None, "empty_file", "no rows"),
    "no prompt": (b'[\n{"prompt": "p", "answer": "a"},\n{"answer": "a"}]', 3, "bad_row", "the row has no 'prompt'"),
    "no answer": (b'[{"prompt": "p"}]', 1, "bad_row", "the row has no 'answer'"),
    "answer of another type": (b'[\n\n{"prompt": "p", "answer": 3}]', 3, "bad_row", "'answer' is a number"),
    "answer null": (b'[{"prompt": "p", "answer": null}]', 1, "bad_row", "'answer' is a null"),
    "answer a list": (b'[{"prompt": "p", "answer": ["a"]}]', 1, "bad_row", "'answer' is a list"),
    "prompt true": (b'[{"prompt": true, "answer": "a"}]', 1, "bad_row", "'prompt' is a boolean"),
    "empty answer": (b'[{"prompt": "p",\n "answer": ""}]', 1, "empty_answer", "'answer' is empty"),
    "blank answer": (b'[{"prompt": "p", "answer": " \\n"}]', 1, "empty_answer", "'answer' is empty"),
    "empty prompt": (b'[{"prompt": "", "answer": "a"}]', 1, "empty_prompt", "'prompt' is empty"),
    "row a string": (b'[\n"p"]', 2, "bad_row", "a row is a string"),
    "half a surrogate": (b'[{"prompt": "\\ud800", "answer": "a"}]', 1, "bad_row", "half of a surrogate pair"),
    "cut off in a row": (b'[\n{"prompt": "p", "answer"', 2, "bad_json", "invalid JSON"),
    "cut off in a string": (b'[\n{"prompt": "p', 2, "bad_json", "invalid JSON"),
    "cut off after a row": (f"[{GOOD}\n".encode(), 2, "bad_json", "expected ',' or ']'"),
    "cut off after a comma": (f"[{GOOD},\n".encode(), 2, "bad_json", "invalid JSON"),
    "comma at the end": (f"[{GOOD},\n]".encode(), 2, "bad_json", "invalid JSON"),
    "no comma": (f"[{GOOD}\n{GOOD}]".encode(), 2, "bad_json", "expected ',' or ']'"),
    "text after the list": (f"[{GOOD}]\n\n{GOOD}".encode(), 3, "bad_json", "text after the end"),
    "text after an empty list": (b"[]\n[]", 2, "bad_json", "text after the end"),
    "two objects on a line": (f"{GOOD}\n{GOOD} {GOOD}".encode(), 2, "bad_json", "two values on one line"),
    "bad line of lines": (f"{GOOD}\n\n{{}}".encode(), 3, "bad_row", "the row has no 'prompt'"),
    "a number": (b"\n7", 2, "bad_json", "neither a JSON list nor"),
    "not JSON": (b"prompt,answer\np,a", 1, "bad_json", "neither a JSON list nor"),
    "NUL bytes": (b"\x00" * 100, 1, "bad_json", "neither a JSON list nor"),
    "not UTF-8": (b'[\n{"prompt": "\xff", "answer": "a"}]', 2, "not_utf8", "byte 14 is not UTF-8"),
    "UTF-16": (f"[{GOOD}]".encode("utf-16"), 1, "not_utf8", "is not UTF-8"),
    "a pickle": (b"\x80\x04\x95\x10", 1, "not_utf8", "is not UTF-8"),
    "deep lists": (b"[" * 1_000_000, 1, "too_deep", "nested too deeply"),
    "deep objects": (b'[\n{"prompt":' * 1 + b'{"a":' * 1_000_000, 2, "too_deep", "nested too deeply"),
    "long number": (b'[{"prompt": ' + b"9" * 100_000 + b', "answer": "a"}]', 1, "bad_json", "invalid JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_names_file_line_and_mend(tmp_path: Path, case: str) -> None:
    content, line, code, message = BAD_FILES[case]
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(StreamError) as caught:
        read_rows(path)
    text = str(caught.value)
    assert caught.value.code == code
    assert message in text
    assert text.startswith(f"{path}: " if line is None else f"{path}:{line}: ")
    assert "\n" not in text
    assert len(text) < len(str(path)) + 200


plain = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: bool(text.strip()))
row = st.fixed_dictionaries({"prompt": plain, "answer": plain}, optional={"extra": st.integers() | st.none()})
blank = st.text(" \t\n\r", max_size=4)


@st.composite
def files(draw: st.DrawFn) -> tuple[str, list[dict[str, Any]], list[int]]:
    """A JSON list with free white space: its text, its rows, the line on which each begins."""
    rows = draw(st.lists(row, min_size=1, max_size=6))
    text = draw(blank) + "["
    lines = []
    for number, value in enumerate(rows):
        text += ("," if number else "") + draw(blank)
        lines.append(text.count("\n") + 1)
        text += json.dumps(value, indent=draw(st.sampled_from([None, 1]))) + draw(blank)
    return text + "]" + draw(blank), rows, lines


@given(files())
def test_rows_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, file: Any) -> None:
    text, rows, _ = file
    path = tmp_path_factory.mktemp("rows") / "train.json"
    path.write_bytes(text.encode())
    assert list(read_rows(path)) == [Example(value["prompt"], value["answer"]) for value in rows]


@given(files(), st.data())
def test_the_line_of_a_bad_row_is_its_line(
    tmp_path_factory: pytest.TempPathFactory, file: Any, data: st.DataObject
) -> None:
    text, rows, lines = file
    bad = data.draw(st.integers(0, len(rows) - 1))
    # the bad row: an own marker in place of a field's name, of the same length, so that no line moves
    parts = text.split('"prompt"')
    if len(parts) - 1 != len(rows):  # a text that says "prompt" itself
        return
    text = '"prompt"'.join(parts[: bad + 1]) + '"Prompt"' + '"prompt"'.join(parts[bad + 1 :])
    path = tmp_path_factory.mktemp("rows") / "train.json"
    path.write_bytes(text.encode())
    with pytest.raises(StreamError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:{lines[bad]}: the row has no 'prompt'")


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_rows_or_a_typed_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("rows") / "train.json"
    path.write_bytes(content)
    for read in (read_rows, read_json):
        try:
            read(path)
        except StreamError as error:
            assert str(error).startswith(str(path))


def test_a_file_over_the_cap_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    with path.open("wb") as file:
        file.truncate(rows_module.MAX_FILE_BYTES + 1)  # sparse: reading it would cost the memory that the cap saves
    with pytest.raises(StreamError, match="bytes, at most") as caught:
        read_rows(path)
    assert caught.value.code == "file_too_large"


def test_rows_over_the_cap_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_ROWS", 2)
    path = tmp_path / "train.json"
    path.write_text(f"[{GOOD},\n{GOOD}]")
    assert len(read_rows(path)) == 2
    path.write_text(f"[{GOOD},\n{GOOD},\n{GOOD}]")
    with pytest.raises(StreamError, match=r"train\.json:3: more than 2 rows") as caught:
        read_rows(path)
    assert caught.value.code == "too_many_rows"


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    os.mkfifo(path)
    with pytest.raises(StreamError, match="not a regular file") as caught:
        read_rows(path)
    assert caught.value.code == "not_a_file"


def test_a_device_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.symlink_to("/dev/zero")
    with pytest.raises(StreamError, match="not a regular file"):
        read_rows(path)


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="not a regular file"):
        read_rows(tmp_path)
