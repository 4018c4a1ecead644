"""The command line: exit codes, one line for a mistake, one document for a program, and nothing heavy imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from moses.cli import calls, main
from moses.cli.app import app
from moses.cli.running import parse_settings, parse_tasks
from moses.errors import ConfigError, ModelError

HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy", "matplotlib", "safetensors")


def test_commands_and_options(golden):
    """What users type; the layout of help texts is typer's and may change with it."""
    lines = []
    for name, command in typer.main.get_command(app).commands.items():
        lines.append(f"{name}: {command.help}")
        for parameter in command.params:
            needed = " (required)" if parameter.required else ""
            shown = (
                " ".join(getattr(parameter, "opts", ())) if parameter.param_type_name == "option" else parameter.metavar
            )
            default = "" if parameter.default in (None, False) or parameter.required else f" [{parameter.default}]"
            lines.append(f"    {shown}{needed}: {parameter.help}{default}")
    golden("cli_commands.txt", "\n".join(lines) + "\n")


def test_help_is_shown_for_every_command(cli):
    for words in ([], ["--help"], ["-h"], *([name, "--help"] for name in typer.main.get_command(app).commands)):
        code, out, err = cli(*words)
        assert (code, err) == (0, ""), words
        assert out.startswith("Usage: moses")
        assert "..." not in out.partition("Commands:")[2], "a summary was cut"


def test_the_version(cli):
    code, out, _ = cli("--version")
    assert code == 0 and out.startswith("moses ")


@pytest.mark.parametrize(
    "words",
    [
        ["bogus"],
        ["--bogus"],
        ["train"],
        ["train", "--model", "m", "--stream", "s", "--out", "r", "--seed", "x"],
        ["train", "--model", "m", "--stream", "s", "--out", "r", "--seed", "-1"],
        ["train", "--model", "m", "--stream", "s", "--out", "r", "--set", "rank"],
        ["train", "--model", "m", "--stream", "s", "--out", "r", "--set", "rank=1", "--set", "rank=2"],
        ["train", "--model", "m", "--stream", "s", "--out", "r", "--tasks", "a,,b"],
        ["evaluate", "RUN", "--mode", "wrong"],
        ["generate", "RUN"],
        ["inspect"],
        ["inspect", "absent"],
        ["inspect", "empty"],
        ["inspect", "file.txt"],
        ["verify", "absent"],
        ["verify", "a", "b"],
        ["report", "absent"],
        ["report", "empty"],
        ["compare"],
        ["compare", "absent"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2_and_one_line(cli, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file.txt").write_text("hello")
    code, out, err = cli(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err


def test_messages(cli, golden, tmp_path, monkeypatch):
    """Those of moses; typer's own words for a wrong option may change with it."""
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file.txt").write_text("hello")
    Path("damaged").mkdir()
    Path("damaged/results.json").write_text('{"method": 3, "tasks": ["a"]}')
    words = [
        ["inspect", "absent"],
        ["inspect", "empty"],
        ["inspect", "file.txt"],
        ["verify", "empty", "--against", "empty"],
        ["report", "absent"],
        ["report", "empty"],
        ["report", "damaged"],
        ["train", "--model", "m", "--stream", "s", "--out", "r", "--set", "rank"],
        ["train", "--model", "m", "--stream", "s", "--out", "r", "--set", "rank=1", "--set", "rank=2"],
        ["train", "--model", "m", "--stream", "s", "--out", "r", "--tasks", "a,,b"],
    ]
    text = "".join(f"$ moses {' '.join(line)}\n{cli(*line)[2]}" for line in words)
    golden("cli_messages.txt", text.replace(f"{tmp_path}/", ""))


def test_errors_of_moses_are_one_line_whatever_they_hold(cli, monkeypatch, run):
    def fail(*_):
        raise ModelError("two\nlines and \x1b[31mred")

    monkeypatch.setattr(calls, "evaluate", fail)
    code, out, err = cli("evaluate", run)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and "\x1b" not in err


@pytest.mark.parametrize("by", ["option", "environment"])
def test_the_traceback_is_shown_on_demand(cli, monkeypatch, tmp_path, by):
    words = ["inspect", tmp_path / "absent"]
    if by == "environment":
        monkeypatch.delenv("MOSES_DEBUG", raising=False)
        code, _, err = cli(*words)
        assert code == 2 and "Traceback" not in err
        environment = {**os.environ, "MOSES_DEBUG": "1"}
        shown = subprocess.run(
            [sys.executable, "-m", "moses", *map(str, words)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert shown.returncode == 2 and "Traceback" in shown.stderr
    else:
        code, _, err = cli("--debug", *words)
        assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: ")


def test_a_bug_is_told_with_its_traceback(cli, monkeypatch, run):
    def fail(*_):
        raise AssertionError("impossible")

    monkeypatch.setattr(calls, "evaluate", fail)
    code, _, err = cli("evaluate", run)
    assert code == 70
    assert "Traceback" in err and err.splitlines()[-1] == "error: this is a bug in moses: AssertionError: impossible"


def test_ctrl_c_says_how_to_go_on(cli, monkeypatch, tmp_path):
    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calls, "train", stop)
    code, out, err = cli("train", "--model", "m", "--stream", "s", "--out", tmp_path / "r")
    assert (code, out) == (130, "")
    assert "--resume goes on" in err and err.count("\n") == 1


def test_a_closed_pipe_is_no_error(run):
    script = "import sys; from moses.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "inspect", str(run), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, err = process.communicate(timeout=30)
    assert err == b""
    assert process.returncode in (0, 141)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(13, "Permission denied", "r"),
            "error: r: permission denied; check who may read and write it\n",
        ),
        (OSError(28, "No space left on device", "r"), "error: r: no space left on device; check the disk\n"),
        (NotADirectoryError(20, "Not a directory", "r"), "error: r: not a directory; give a folder\n"),
        (OSError("something"), "error: something\n"),
    ],
)
def test_errors_of_the_system_are_one_line(cli, monkeypatch, run, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(calls, "evaluate", fail)
    assert cli("evaluate", run) == (2, "", line)


# -- commands that run a model: what they are given reaches the right call ---------------------------------------------


def test_train_hands_over_every_option(cli, monkeypatch, run, runs, golden):
    given = {}
    monkeypatch.setattr(calls, "train", lambda **options: given.update(options))
    pairs = ["rank=4", "alpha=0.5", "reuse=none", 'target_modules=["q","v"]', "x=a=b"]
    settings = [word for pair in pairs for word in ("--set", pair)]
    words = ["--model", "m", "--stream", "s", "--out", run, "--method", "sequential"]
    words += ["--tasks", " a, b", "--resume", "--seed", "3", "--boundaries", "none", "--budget", "2MB"]
    code, out, err = cli("train", *words, *settings)
    assert (code, err) == (0, "")
    assert given == {
        "model": "m",
        "stream": "s",
        "method": "sequential",
        "out": run,
        "tasks": ["a", "b"],
        "resume": True,
        "seed": 3,
        "settings": {"rank": 4, "alpha": 0.5, "reuse": "none", "target_modules": ["q", "v"], "x": "a=b"},
        "boundaries": "none",
        "budget": "2MB",
    }
    golden("cli_train.txt", "\n".join(line.rstrip() for line in out.replace(str(run), "RUN").splitlines()) + "\n")


def test_the_defaults_of_train(cli, monkeypatch, run):
    given = {}
    monkeypatch.setattr(calls, "train", lambda **options: given.update(options))
    assert cli("train", "--model", "m", "--stream", "s", "--out", run)[0] == 0
    assert (given["method"], given["tasks"], given["resume"], given["seed"], given["settings"]) == (
        "moses",
        None,
        False,
        0,
        {},
    )


def test_evaluate(cli, monkeypatch, run):
    scores = {"method": "moses", "tasks": ["a"], "til": {"row": [50.0], "op": 50.0}}
    monkeypatch.setattr(calls, "evaluate", lambda path, mode: scores | {"mode": mode})
    code, out, _ = cli("evaluate", run, "--json")
    assert code == 0 and json.loads(out)["mode"] == "both"
    code, out, _ = cli("evaluate", run, "--mode", "til")
    assert code == 0 and "50.0" in out and "TaIL" not in out


def test_generate(cli, monkeypatch, run):
    found = {"task": "emotion", "task_probability": 0.987, "answer": "joy\nand more"}
    monkeypatch.setattr(calls, "answer", lambda path, task, prompt: found | {"asked": [task, prompt]})
    code, out, err = cli("generate", run, "--prompt", "I am glad")
    assert (code, out, err) == (0, "task  emotion (98.7%)\njoy\nand more\n", "")
    code, out, _ = cli("generate", run, "--prompt", "x", "--task", "t", "--json")
    assert json.loads(out)["asked"] == ["t", "x"]
    monkeypatch.setattr(calls, "answer", lambda *_: {"task": None, "task_probability": 0.4, "answer": "?"})
    assert cli("generate", run, "--prompt", "x")[1] == "task  unknown (40.0%)\n?\n"


def test_forget(cli, monkeypatch, run):
    monkeypatch.setattr(calls, "forget", lambda path, task: {"task": task, "bytes_freed": 1500, "method": "moses"})
    assert cli("forget", run, "--task", "emotion")[:2] == (0, "forgotten  emotion\nfreed      1.5 kB\n")
    assert json.loads(cli("forget", run, "--task", "emotion", "--json")[1])["bytes_freed"] == 1500


def test_settings_are_json_or_text():
    deep = "[" * 100_000
    values = {"a": 1, "b": True, "c": None, "d": "text", "e": "", "f": [1, 2], "g": 1e-4, "h": "{bad", "i": deep}
    pairs = ["a=1", "b=true", "c=null", "d=text", "e=", "f=[1,2]", "g=1e-4", "h={bad", f"i={deep}"]
    assert parse_settings(pairs) == values
    for wrong in (["rank"], ["=4"], ["a=1", "a=1"]):
        with pytest.raises(ConfigError):
            parse_settings(wrong)
    assert parse_tasks("a") == ["a"]


# -- lightness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "inspect RUN",
        "inspect RUN --json",
        "verify RUN",
        "verify RUN --against RUN",
        "doctor",
        "doctor --help",
        "train --help",
        "generate --help",
    ],
)
def test_light_commands_import_nothing_heavy(run, words):
    """Importing torch takes seconds, and these commands must end at once."""
    script = (
        "import sys; from moses.cli import main; code = main(sys.argv[1:]); "
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *words.replace("RUN", str(run)).split()]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    code, heavy = ended.stderr.strip().splitlines()[-1].split(" ", 1)
    assert heavy == "[]", ended.stderr
    assert code == "0" or words == "doctor"


def test_main_takes_the_words_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moses", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("moses ")
