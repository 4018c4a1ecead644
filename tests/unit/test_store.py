"""The run folder: commits, names, locks, readers, and how damage is named."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from moses._core import Store, atomic_write, blake3_hex, hash_buffers
from moses.errors import FormatError, RegistryError, StoreError

WEIGHTS = "tasks/000-fomc/weights.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_committed_is_read(run: Path) -> None:
    with Store.create(run) as store:
        assert (store.generation, store.files(), store.recovered) == (0, {}, None)
        assert store.commit({"config.json": b"{}", WEIGHTS: np.arange(4, dtype=np.float32)}) == 1
    with Store.open(run) as store:
        assert store.generation == 1
        assert store.read("config.json") == b"{}"
        assert np.frombuffer(store.read(WEIGHTS), np.float32).tolist() == [0, 1, 2, 3]
        info = store.files()[WEIGHTS]
        assert (info.path, info.bytes, info.blake3) == (WEIGHTS, 16, blake3_hex(np.arange(4, dtype=np.float32)))
        assert store.path(WEIGHTS) == str(run / WEIGHTS)
        assert store.verify() == []


def test_a_replaced_file_gets_a_path_of_its_own_and_the_old_one_goes(run: Path) -> None:
    with Store.create(run) as store:
        store.commit({"registry.moses": b"1", WEIGHTS: b"w"})
        store.commit({"registry.moses": b"2"})
        assert store.files()["registry.moses"].path == "registry.g2.moses"
        assert listing(run) == [".lock", "manifest.json", "registry.g2.moses", WEIGHTS]
        store.commit({}, delete=[WEIGHTS])
        assert not (run / "tasks").exists()
        assert store.commit({"registry.moses": b"3"}) == 4
        assert store.read("registry.moses") == b"3"


def test_the_manifest_says_what_is_there(run: Path) -> None:
    with Store.create(run) as store:
        store.commit({"config.json": b"{}"})
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["format"] == "moses-run"
    assert (manifest["version"], manifest["generation"]) == (1, 1)
    assert manifest["files"] == {"config.json": {"path": "config.json", "bytes": 2, "blake3": blake3_hex(b"{}")}}


def test_any_mapping_and_any_buffer_are_taken(run: Path) -> None:
    with Store.create(run) as store:
        store.commit(MappingProxyType({"a": bytearray(b"1"), "b": memoryview(b"22")}), delete=())
        store.commit({}, delete=("a",))
        assert store.read("b") == b"22"
        for wrong in ([("a", b"1")], {"a": "text"}, {1: b"1"}, None):
            with pytest.raises(TypeError):
                store.commit(wrong)
        with pytest.raises(TypeError):
            store.commit({}, delete="b")


def test_other_files_of_the_folder_are_left_alone(run: Path) -> None:
    run.mkdir()
    (run / "log.jsonl").write_text("mine")
    (run / "config.json").write_text("mine too")
    with Store.create(run) as store:
        store.commit({"config.json": b"{}"})
        store.commit({"config.json": b"{1}"}, [])
        assert store.read("config.json") == b"{1}"
    assert (run / "log.jsonl").read_text() == "mine"
    assert (run / "config.json").read_text() == "mine too"


def test_one_writer_at_a_time_and_readers_never_wait(run: Path) -> None:
    with Store.create(run) as store:
        store.commit({"a": b"1"})
        with pytest.raises(StoreError, match="another process is writing"):
            Store.open(run, write=True)
        code = "import sys; from moses._core import Store; Store.open(sys.argv[1], write=True)"
        other = subprocess.run([sys.executable, "-c", code, run], capture_output=True, text=True)
        assert "another process is writing" in other.stderr
        with Store.open(run) as reader:
            assert reader.read("a") == b"1"
    Store.open(run, write=True).close()


def test_a_reader_that_is_overtaken_is_told_so(run: Path) -> None:
    with Store.create(run) as store, Store.open(run) as early:
        store.commit({"a": b"1"})
        with Store.open(run) as reader:
            store.commit({"a": b"2"})
            with pytest.raises(StoreError, match="generation 1 to 2") as caught:
                reader.read("a")
            assert caught.value.code == "store_changed"
        with pytest.raises(StoreError, match='no file "a"'):
            early.read("a")


def test_a_closed_store_does_nothing(run: Path) -> None:
    store = Store.create(run)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="was closed"):
        store.commit({"a": b""})
    with pytest.raises(StoreError, match="was closed"):
        store.verify()


def test_where_nothing_is(run: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Store.open(run)
    assert caught.value.filename == str(run)
    run.mkdir()
    with pytest.raises(StoreError, match="not a run folder") as refused:
        Store.open(run, write=True)
    assert refused.value.code == "not_a_run"
    assert list(run.iterdir()) == [], "opening leaves a folder that is no run as it was"
    (run / "file").touch()
    with pytest.raises(NotADirectoryError):
        Store.open(run / "file")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../out",
        "a/../../out",
        "a//b",
        ".hidden",
        "a/.b",
        "a\0b",
        "a b",
        "ä",
        "manifest.json",
        "x" * 201,
    ],
)
def test_names_that_could_lead_anywhere_are_refused(run: Path, name: str) -> None:
    with Store.create(run) as store:
        with pytest.raises(StoreError) as caught:
            store.commit({"good": b"1", name: b"2"})
        assert caught.value.code == "file_name_invalid"
        assert store.files() == {}
        assert listing(run) == [".lock", "manifest.json"]


@pytest.mark.parametrize("change", ["flip", "cut", "grow", "remove", "link", "folder"])
def test_damage_is_named(run: Path, change: str) -> None:
    with Store.create(run) as store:
        store.commit({"a/one": b"1234", "two": b"5678"})
    path = run / "a" / "one"
    if change in ("remove", "link", "folder"):
        path.unlink()
    match change:
        case "flip":
            path.write_bytes(b"1235")
        case "cut":
            path.write_bytes(b"123")
        case "grow":
            path.write_bytes(b"12345")
        case "link":
            (run / "elsewhere").write_bytes(b"1234")
            path.symlink_to(run / "elsewhere")
        case "folder":
            path.mkdir()
    with Store.open(run) as store:
        [(name, code, message)] = store.verify()
        assert name == "a/one"
        assert str(path) in message
        assert "\n" not in message
        wanted = StoreError if change == "remove" else FormatError
        with pytest.raises(wanted) as caught:
            store.read("a/one")
        assert (caught.value.code, str(caught.value)) == (code, message)
        assert code == ("file_missing" if change == "remove" else "file_damaged")
        assert store.read("two") == b"5678"


def test_links_are_not_followed(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "one").write_bytes(b"1234")
    with Store.create(run) as store:
        store.commit({"a/one": b"1234"})
        (run / "a" / "one").unlink()
        (run / "a").rmdir()
        (run / "a").symlink_to(outside)
        with pytest.raises(FormatError):
            store.read("a/one")
        with pytest.raises(StoreError) as caught:
            store.commit({"a/two": b""})
        assert caught.value.code == "path_taken"
        store.commit({}, delete=["a/one"])
    assert listing(outside) == ["one"]


def test_a_pipe_in_place_of_a_file_does_not_hang(run: Path) -> None:
    with Store.create(run) as store:
        store.commit({"one": b""})
    (run / "one").unlink()
    os.mkfifo(run / "one")
    (run / "results.json").symlink_to("nowhere")
    with Store.open(run) as store:
        assert [code for _, code, _ in store.verify()] == ["file_damaged"]
    (run / "manifest.json").unlink()
    os.mkfifo(run / "manifest.json")
    with pytest.raises(FormatError, match="not a regular file"):
        Store.open(run)


def test_errors_of_the_system_stay_pythons(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "no" / "file", b"")
    with pytest.raises(IsADirectoryError):
        run.mkdir()
        atomic_write(run, b"")
    with pytest.raises(NotADirectoryError):
        (tmp_path / "file").touch()
        Store.create(tmp_path / "file" / "run")


def test_atomic_write_replaces(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for content in (b"first", b"second and longer", b""):
        atomic_write(path, content)
        assert path.read_bytes() == content
        assert listing(tmp_path) == ["results.json"]
    previous = os.umask(0o027)
    try:
        atomic_write(str(path), b"x")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_atomic_write_passes_what_a_killed_process_left(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f".a.{os.getpid()}-{number}.tmp").write_text("left")
    atomic_write(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_failed_atomic_write_leaves_no_temporary(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    (target / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        atomic_write(target, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_relative_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    atomic_write("a.txt", b"x")
    with Store.create("run") as store:
        store.commit({"a": b"1"})
        monkeypatch.chdir("/")
        assert store.path("a") == str(tmp_path / "run" / "a")
        store.commit({"a": b"2"})
        assert Path(store.path("a")).read_bytes() == b"2"
    assert (tmp_path / "a.txt").exists()


def test_files_are_readable_by_the_group(run: Path) -> None:
    previous = os.umask(0o022)
    try:
        with Store.create(run) as store:
            store.commit({"a/b": b"1"})
    finally:
        os.umask(previous)
    assert stat.S_IMODE((run / "a" / "b").stat().st_mode) == 0o644
    assert stat.S_IMODE((run / "manifest.json").stat().st_mode) == 0o644
    assert stat.S_IMODE((run / "a").stat().st_mode) == 0o755


def test_hashes() -> None:
    # Published test vector of BLAKE3: the empty input.
    assert blake3_hex(b"") == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    big = np.arange(3_000_000, dtype=np.uint8)
    assert blake3_hex(big) == blake3_hex(big.tobytes())


def test_a_forked_process_hashes_without_the_threads_of_its_parent() -> None:
    code = (
        "import os\nfrom moses._core import blake3_hex\ndata = bytes(4_000_000)\nwanted = blake3_hex(data)\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if blake3_hex(data) == wanted else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_machine_that_refuses_threads_hashes_without() -> None:
    code = (
        "import resource\nfrom pathlib import Path\nfrom moses._core import blake3_hex\ndata = bytes(4_000_000)\n"
        "size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), resource.RLIM_INFINITY))\nprint(blake3_hex(data))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == blake3_hex(bytes(4_000_000))


def test_a_fingerprint_counts_names_lengths_and_bytes_but_not_order() -> None:
    one, two = ("a", np.zeros(4, np.uint8)), ("b", np.ones(2, np.float32))
    fingerprint = hash_buffers([one, two])
    assert fingerprint == hash_buffers([two, one])
    others = [
        [one],
        [one, ("c", two[1])],
        [("a", np.zeros(5, np.uint8)), two],
        [one, ("b", np.array([1, 2], np.float32))],
        [("b", one[1]), ("a", two[1])],
        [],
    ]
    assert len({fingerprint, *map(hash_buffers, others)}) == 7
    with pytest.raises(RegistryError, match="twice"):
        hash_buffers([one, one])
