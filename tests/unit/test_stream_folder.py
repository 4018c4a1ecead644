"""Folders of tasks: order, metrics, what is chosen, and the message for each mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moses.errors import StreamError
from moses.stream import Example, load_stream
from moses.stream.trace import TRACE_METRICS

ROWS = [{"prompt": f"question {number}?", "answer": f"answer {number}"} for number in range(10)]


def write_task(root: Path, name: str, rows: list[dict[str, str]] = ROWS) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for split in ("train", "eval", "test"):
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder


def write_settings(root: Path, settings: object) -> None:
    (root / "stream.json").write_text(json.dumps(settings))


def names(root: Path, tasks: list[str] | None = None) -> list[str]:
    return [task.name for task in load_stream(root, tasks).tasks]


def test_reads_each_split_from_its_own_file(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "a")
    for split in ("train", "eval", "test"):
        (folder / f"{split}.json").write_text(json.dumps([{"prompt": f"p {split}", "answer": f"a {split}"}]))
    (task,) = load_stream(tmp_path).tasks
    assert (task.train, task.eval, task.test) == tuple(
        (Example(f"p {split}", f"a {split}"),) for split in ("train", "eval", "test")
    )
    assert task.metric == "accuracy"
    assert load_stream(tmp_path).name == tmp_path.name


def test_without_settings_folders_come_by_name(tmp_path: Path) -> None:
    for name in ("b", "C", "a"):
        write_task(tmp_path, name)
    (tmp_path / "notes").mkdir()  # no task
    (tmp_path / "README.md").write_text("no task")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "train.json").write_text("[]")
    assert names(tmp_path) == ["C", "a", "b"]


def test_settings_give_order_and_metrics(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_task(tmp_path, name)
    write_settings(tmp_path, {"tasks": ["c", "a"], "metrics": {"a": "rouge_l"}})
    stream = load_stream(tmp_path)
    assert [(task.name, task.metric) for task in stream.tasks] == [("c", "accuracy"), ("a", "rouge_l")]


def test_chosen_tasks_win_over_settings(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_task(tmp_path, name)
    write_settings(tmp_path, {"tasks": ["c", "a"]})
    assert names(tmp_path, ["b", "c"]) == ["b", "c"]


def test_trace_as_it_is_downloaded(tmp_path: Path) -> None:
    for name in [*sorted(TRACE_METRICS), "Lima"]:
        write_task(tmp_path, name)
    (tmp_path / ".DS_Store").write_bytes(b"\x00")
    assert [(task.name, task.metric) for task in load_stream(tmp_path).tasks] == [
        ("C-STANCE", "accuracy"),
        ("FOMC", "accuracy"),
        ("MeetingBank", "rouge_l"),
        ("Py150", "edit_similarity"),
        ("ScienceQA", "accuracy"),
        ("NumGLUE-cm", "exact_match"),
        ("NumGLUE-ds", "exact_match"),
        ("20Minuten", "sari"),
    ]


def test_some_of_trace_come_first_in_its_order(tmp_path: Path) -> None:
    for name in ("20Minuten", "FOMC", "aaa"):
        write_task(tmp_path, name)
    assert names(tmp_path) == ["FOMC", "20Minuten", "aaa"]


def test_limits_spread_over_a_sorted_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"{label} {number}", "answer": label} for label in ("x", "y") for number in range(50)]
    write_task(tmp_path, "a", rows)
    (task,) = load_stream(tmp_path, num_train=10, num_test=100_000).tasks
    assert [example.answer for example in task.train] == ["x"] * 5 + ["y"] * 5
    assert len(task.eval) == len(task.test) == 100
    assert len(set(task.train)) == 10


@pytest.mark.parametrize("suffix", ["", "\n"])
def test_one_object_a_line(tmp_path: Path, suffix: str) -> None:
    folder = write_task(tmp_path, "a")
    (folder / "train.json").write_text("\n".join(map(json.dumps, ROWS)) + suffix)
    assert load_stream(tmp_path).tasks[0].train == load_stream(tmp_path).tasks[0].test


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    folder = write_task(tmp_path, "a")
    (folder / "train.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    assert len(load_stream(tmp_path).tasks[0].train) == 10


MISTAKES = {
    "missing folder": (
        lambda root: load_stream(root / "nowhere"),
        "stream_missing",
        "{root}/nowhere: there is no such",
    ),
    "a file": (lambda root: load_stream(root / "a" / "train.json"), "stream_missing", "train.json: not a folder"),
    "empty folder": (
        lambda root: load_stream(root / "empty"),
        "stream_empty",
        "{root}/empty: no task in it: a task is",
    ),
    "one too high": (lambda root: load_stream(root.parent), "stream_empty", "({root} has tasks: give that)"),
    "unknown stream": (lambda root: load_stream("nostream"), "unknown_stream", "'nostream': no such folder, and"),
    "unknown task": (lambda root: load_stream(root, ["z"]), "unknown_task", "unknown task 'z': the stream has a, b"),
    "unknown demo task": (
        lambda root: load_stream("tiny", ["z"]),
        "unknown_task",
        "'z': the stream has living, things",
    ),
    "no task": (lambda root: load_stream(root, []), "unknown_task", "no task chosen: name at least one of a, b"),
    "task twice": (lambda root: load_stream(root, ["a", "a"]), "task_twice", "'a' is there twice"),
    "bad limit": (lambda root: load_stream(root, num_eval=0), "bad_limit", "num_eval is 0: it must be 1 or more"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_in_the_call(tmp_path: Path, case: str) -> None:
    call, code, message = MISTAKES[case]
    root = tmp_path / "streams" / "mine"
    write_task(root, "a")
    write_task(root, "b")
    (root / "empty").mkdir()
    with pytest.raises(StreamError) as caught:
        call(root)
    assert caught.value.code == code
    assert message.format(root=root) in str(caught.value)
    assert "\n" not in str(caught.value)


SETTINGS_MISTAKES = {
    "not an object": (["a"], "bad_settings", "must be an object"),
    "unknown field": ({"metric": {}}, "bad_settings", "unknown field 'metric': it takes 'tasks' and 'metrics'"),
    "tasks no list": ({"tasks": "a"}, "bad_settings", "'tasks' must be a list"),
    "tasks empty": ({"tasks": []}, "bad_settings", "'tasks' must be a list"),
    "tasks of numbers": ({"tasks": [1]}, "bad_settings", "'tasks' must be a list"),
    "metrics a list": ({"metrics": ["a"]}, "bad_settings", "'metrics' must be an object"),
    "unknown task": ({"tasks": ["a", "b"]}, "unknown_task", "no folder 'b' with train.json"),
    "unknown task's metric": ({"metrics": {"b": "sari"}}, "unknown_task", "'metrics': no task 'b': it has a"),
    "unknown metric": (
        {"metrics": {"a": "bleu"}},
        "unknown_metric",
        "unknown metric 'bleu': use one of accuracy, exact",
    ),
    "twice": ({"tasks": ["a", "a"]}, "task_twice", "'a' is there twice"),
    "out of the folder": ({"tasks": ["../a"]}, "bad_task_name", "'../a': a name has letters"),
}


@pytest.mark.parametrize("case", SETTINGS_MISTAKES)
def test_mistake_in_the_settings(tmp_path: Path, case: str) -> None:
    settings, code, message = SETTINGS_MISTAKES[case]
    write_task(tmp_path, "a")
    write_settings(tmp_path, settings)
    with pytest.raises(StreamError) as caught:
        load_stream(tmp_path)
    assert caught.value.code == code
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("split", ["eval", "test"])
def test_a_missing_file_is_named(tmp_path: Path, split: str) -> None:
    folder = write_task(tmp_path, "a")
    (folder / f"{split}.json").unlink()
    with pytest.raises(StreamError, match=rf"a/{split}\.json: there is no such file") as caught:
        load_stream(tmp_path)
    assert caught.value.code == "file_missing"


def test_a_folder_whose_name_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    write_task(tmp_path, "my task")
    with pytest.raises(StreamError, match=r"'my task'.*rename the folder"):
        load_stream(tmp_path)


def test_streams_need_no_torch() -> None:
    code = (
        "import sys, moses.stream, moses.metrics, moses.models, moses.stream.prompt;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rouge_score', 'rapidfuzz') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
