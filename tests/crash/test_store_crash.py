"""Writers are killed and disks refuse, on the machine's own file system: the old state or the new, never a mix.

That every single operation of a commit may be the last, with unsynced data lost, is proved on the fault-injecting file
system of the core (`store/tests.rs`); here the real one is under it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moses._core import Store

COMMIT_FOR_EVER = """
import sys
from moses._core import Store
store = Store.open(sys.argv[1], write=True)
while True:
    number = store.generation + 1
    text = str(number).encode()
    names = {f"tasks/{number % 5:03d}/adapter.bin": text * 20_000, "registry.moses": text, "config.json": text}
    gone = [name for name in store.files() if name.startswith("tasks/") and name not in names and number % 3 == 0]
    print(store.commit(names, gone), flush=True)
"""

WRITE_FOR_EVER = """
import sys
from moses._core import atomic_write
number = 0
while True:
    number += 1
    atomic_write(sys.argv[1], str(number % 10).encode() * 50_000)
    print(number, flush=True)
"""


def killed(code: str, target: Path, after: float) -> int:
    """Runs code until it has printed once and some time more, kills it, and gives back the last number it printed."""
    with subprocess.Popen([sys.executable, "-c", code, target], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(after)
        process.kill()
        rest = process.stdout.read()
    # The last line may be cut.
    return int(([first.strip()] + [line for line in rest.split("\n")[:-1] if line])[-1])


def test_a_killed_writer_leaves_a_whole_generation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Store.create(run).close()
    dice = random.Random(0)
    generation = 0
    for _ in range(12):
        confirmed = killed(COMMIT_FOR_EVER, run, dice.uniform(0, 0.03))
        with Store.open(run) as reader:
            assert reader.verify() == []
            assert reader.generation >= confirmed > generation
            assert reader.read("registry.moses") == reader.read("config.json") == str(reader.generation).encode()
            generation = reader.generation
        with Store.open(run, write=True) as writer:
            assert writer.generation == generation
            assert writer.recovered is None or f"generation {generation}" in writer.recovered
            live = {info.path for info in writer.files().values()}
        found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
        assert found == live | {"manifest.json", ".lock"}, "nothing of the killed commit stays"


def test_a_killed_atomic_write_leaves_one_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    dice = random.Random(1)
    for _ in range(6):
        killed(WRITE_FOR_EVER, path, dice.uniform(0, 0.02))
        content = path.read_bytes()
        assert len(content) == 50_000
        assert len(set(content)) == 1


FILE_TOO_LARGE = """
import json, resource, sys
from moses._core import Store, atomic_write
store = Store.open(sys.argv[1], write=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
told = []
for attempt in (
    lambda: store.commit({"a": b"2", "z": bytes(1_000_000)}),
    lambda: atomic_write(sys.argv[2], bytes(1_000_000)),
):
    try:
        attempt()
    except OSError as error:
        told.append([type(error).__name__, error.errno, error.filename, str(error)])
told.append([store.generation, store.read("a").decode(), store.commit({"a": b"3"})])
print(json.dumps(told))
"""


def test_a_disk_that_refuses_leaves_the_old_state_and_says_so(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "results.json"
    other.write_text("old")
    with Store.create(run) as store:
        store.commit({"a": b"1"})
    command = [sys.executable, "-c", FILE_TOO_LARGE, run, other]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    commit, write, after = json.loads(done.stdout)
    assert commit[:3] == ["OSError", 27, str(run / "z")]
    assert "\n" not in commit[3]
    assert write[:3] == ["OSError", 27, str(other)]
    assert after == [1, "1", 2], "the old state is in place and the next commit works"
    assert other.read_text() == "old"
    assert sorted(path.name for path in run.iterdir()) == [".lock", "a.g2", "manifest.json"], "nothing of z is left"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "run"]


def test_what_an_unfinished_commit_left_is_cleared_and_told(tmp_path: Path) -> None:
    """The state after a power cut between the new files and the manifest, put together by hand."""
    run = tmp_path / "run"
    with Store.create(run) as store:
        store.commit({"a": b"1"})
    (run / "tasks" / "001").mkdir(parents=True)
    (run / "tasks" / "001" / "w").write_bytes(b"half")
    (run / "a.g2").write_bytes(b"2")
    (run / ".pending").write_text('{"generation":2,"paths":["a","a.g2","tasks/001/w"]}')
    (run / ".manifest.tmp").write_text("{")
    with Store.open(run) as reader:
        assert (reader.generation, reader.recovered) == (1, None)
        assert reader.verify() == []
    with Store.open(run, write=True) as writer:
        assert writer.recovered == "an unfinished commit was cleared away: generation 1 is in place"
        assert writer.read("a") == b"1"
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*")) == [".lock", "a", "manifest.json"]


@pytest.mark.parametrize(
    "note", ["", "{", "\0" * 60, "[" * 50_000, '{"generation":2,"paths":["../outside","/etc/hostname"]}']
)
def test_a_torn_or_hostile_note_does_no_harm(tmp_path: Path, note: str) -> None:
    run = tmp_path / "run"
    with Store.create(run) as store:
        store.commit({"a": b"1"})
    (tmp_path / "outside").write_text("mine")
    (run / ".pending").write_text(note)
    with Store.open(run, write=True) as writer:
        assert writer.read("a") == b"1"
        assert writer.commit({"a": b"2"}) == 2
    assert (tmp_path / "outside").read_text() == "mine"
    assert not (run / ".pending").exists()
