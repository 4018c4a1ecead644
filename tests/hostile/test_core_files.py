"""Damaged and hostile files: each gives a typed error, in little memory, and nothing outside the folder is touched."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moses._core import Mask, Registry, Store, blake3_hex, safetensors_header
from moses.errors import FormatError, MosesError, StoreError


def sample_registry() -> bytes:
    registry = Registry()
    layers = [registry.add_layer(f"model.layers.{at}.mlp", 4, [("A", 8, 2), ("B", 6, 2)]) for at in range(3)]
    for number in range(3):
        task = registry.begin_task(f"task-{number}", domain="news")
        registry.end_task(task, [(layer, "A", Mask.from_indices(32, range(number, 32, 3))) for layer in layers])
        registry.set_content_hash(task, f"{number}" * 64)
    registry.forget_task(1)
    registry.begin_task("open")
    return registry.to_bytes()


REGISTRY = sample_registry()


def sealed(content: bytes) -> bytes:
    """Content with the checksum that makes it look whole: what an attacker writes."""
    return content + bytes.fromhex(blake3_hex(content))


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def name(text: str) -> bytes:
    return b"\0\0" + varint(len(text)) + text.encode()


def registry_file(layers: bytes, tasks: bytes, history: bytes = b"\0") -> bytes:
    sections = [layers, tasks, history]
    body = b"".join(bytes([at]) + struct.pack("<Q", len(part)) + part for at, part in enumerate(sections, 1))
    return sealed(b"MOSESREG\x01\x00" + body)


def bombs() -> dict[str, bytes]:
    """Small files that declare a lot."""
    one_layer = b"\1\1\1" + b"\0" + name("l") + b"\1\0\0" + b"\1" + name("s") + varint(2**28) + varint(2**24)
    no_layers, no_tasks = b"\0\0\0", b"\0\0"
    task = lambda at, mask: b"\0\1" + varint(len(str(at))) + str(at).encode() + b"\1\0\0" + mask  # noqa: E731
    almost_full = b"".join(task(at, b"\4\1" + varint(at) + varint(2**28 - 1 - at)) for at in range(60_000))
    runs = b"\0\1\1a\1\0\0\4" + varint(50_000) + b"\0" * 100_000
    every = varint(2**20 - 1)
    experts = varint(9) + varint(2**20) + varint(9)
    experts += b"".join(b"\0" + name(str(at)) + b"\1\0" + every + b"\1" + name("s") + b"\1\1" for at in range(9))
    return {
        "60,000 masks of almost 2^28 units": registry_file(one_layer, varint(60_000) + varint(60_000) + almost_full),
        "a mask of 50,000 runs that touch": registry_file(one_layer, b"\1\1" + runs),
        "nine layers of a million experts": registry_file(experts, no_tasks),
        "2^64 layers": registry_file(b"\1\1" + varint(2**64 - 1), no_tasks),
        "2^16 tasks in no bytes": registry_file(no_layers, varint(2**16) + varint(2**16)),
        "2^20 events in no bytes": registry_file(no_layers, no_tasks, varint(2**20)),
        "a name of 2^40 bytes": registry_file(b"\1\1\1\0\0\0" + varint(2**40), no_tasks),
        "a section of 2^64 bytes": sealed(b"MOSESREG\x01\x00\x01" + b"\xff" * 8),
        "a Roaring mask of 2^16 containers": registry_file(
            one_layer, b"\1\1\0\1\1a\1\0\0\5\x08" + struct.pack("<II", 12346, 65536)
        ),
        "a layer of 2^60 units": registry_file(
            b"\1\1\1\0" + name("l") + b"\1\0\0\1" + name("s") + varint(2**60) + b"\1", no_tasks
        ),
        "a name that is not UTF-8": registry_file(b"\1\1\1\0\0\0\1\xff\1\0\0\1" + name("s") + b"\1\1", no_tasks),
        "no section": sealed(b"MOSESREG\x01\x00"),
    }


BOMBS = bombs()


def shards() -> dict[str, bytes]:
    def shard(header: str, data: bytes = b"", declared: int | None = None) -> bytes:
        return struct.pack("<Q", len(header) if declared is None else declared) + header.encode() + data

    tensor = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return {
        "empty": b"",
        "seven bytes": bytes(7),
        "a header of 2^64 bytes": b"\xff" * 8,
        "a header of 2^64 bytes and more": shard(tensor, bytes(8), declared=2**64 - 1),
        "a header longer than the file": shard(tensor, bytes(8), declared=len(tensor) + 9),
        "brackets without end": shard("{" + '"a":[' * 100_000),
        "a shape without end": shard(
            '{"a":{"dtype":"F32","shape":[' + "1," * 1_000_000 + '1],"data_offsets":[0,4]}}', bytes(4)
        ),
        "sizes that overflow": shard(tensor.replace("[2]", "[9223372036854775807,2]"), bytes(8)),
        "a hole": shard(tensor.replace("[0,8]", "[8,16]"), bytes(16)),
        "offsets out of order": shard(tensor.replace("[0,8]", "[8,0]"), bytes(8)),
        "bytes after the last tensor": shard(tensor, bytes(9)),
        "data that is cut": shard(tensor, bytes(7)),
        "an unknown dtype": shard(tensor.replace("F32", "F33"), bytes(8)),
        "a tensor twice": shard(tensor[:-1] + "," + tensor[1:], bytes(8)),
        "a pickle": pickle.dumps({"a": 1}) * 3,
        "not UTF-8": struct.pack("<Q", 4) + b"{\xff\xff}",
        "metadata that is no text": shard('{"__metadata__":{"a":1}}'),
    }


SHARDS = shards()


@pytest.mark.parametrize("what", BOMBS)
def test_a_registry_that_declares_too_much(what: str) -> None:
    with pytest.raises(FormatError) as caught:
        Registry.from_bytes(BOMBS[what])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", SHARDS)
def test_a_shard_that_breaks_a_rule(what: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SHARDS[what])
    with pytest.raises(FormatError, match="not a valid safetensors file") as caught:
        safetensors_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_as_the_library_writes_it(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = {"a": np.zeros((2, 3), np.float32), "b.c": np.ones(4, np.int8), "empty": np.zeros((0, 5), np.float16)}
    safetensors.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    header, metadata = safetensors_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "np"}
    assert {key: (entry[0], entry[1]) for key, entry in header.items()} == {
        "a": ("F32", [2, 3]),
        "b.c": ("I8", [4]),
        "empty": ("F16", [0, 5]),
    }
    assert sorted(end - begin for _, _, begin, end in header.values()) == [0, 4, 24]


def test_a_shard_that_is_not_there_or_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        safetensors_header(tmp_path / "none")
    with pytest.raises(FormatError, match="regular file"):
        safetensors_header(tmp_path)


IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from moses._core import Registry, Store, safetensors_header
from moses.errors import FormatError
folder = Path(sys.argv[1])
files = sorted(folder.iterdir())
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
for path in files:
    try:
        if path.suffix == ".moses":
            Registry.from_bytes(path.read_bytes())
        elif path.suffix == ".run":
            Store.open(path)
        else:
            safetensors_header(path)
    except FormatError:
        continue
    sys.exit(f"{path.name} was accepted")
print(len(files))
"""


def test_all_of_them_in_64_mebibytes(tmp_path: Path) -> None:
    """Address space, not only what is touched: an allocation that is merely declared fails too."""
    for at, data in enumerate(BOMBS.values()):
        (tmp_path / f"{at}.moses").write_bytes(data)
    for at, data in enumerate(SHARDS.values()):
        (tmp_path / f"{at}.safetensors").write_bytes(data)
    small = '"%d":{"path":"p%d","bytes":1,"blake3":"' + "0" * 64 + '"}'
    many = ",".join(small % (at, at) for at in range(150_000))
    head = '{"format":"moses-run","version":1,"generation":1,"checksum":"","files":'
    for at, text in enumerate([head + "{" + many + "}}", "[" * 10**7, head + '{"a":' * 10**6, " " * (1 << 25)]):
        (tmp_path / f"{at}.run").mkdir()
        (tmp_path / f"{at}.run" / "manifest.json").write_text(text)
    done = subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY, tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, str(len(BOMBS) + len(SHARDS) + 4)), done.stderr


def test_every_cut_of_a_registry_is_found() -> None:
    for length in range(len(REGISTRY)):
        with pytest.raises(FormatError):
            Registry.from_bytes(REGISTRY[:length])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(REGISTRY) - 1), st.integers(0, 7))
def test_every_flipped_bit_of_a_registry_is_found(position: int, bit: int) -> None:
    data = bytearray(REGISTRY)
    data[position] ^= 1 << bit
    with pytest.raises(FormatError):
        Registry.from_bytes(data)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(10, len(REGISTRY) - 33), st.integers(0, 255)), min_size=1, max_size=4))
def test_changes_under_a_right_checksum_give_an_error_or_a_whole_registry(changes: list[tuple[int, int]]) -> None:
    data = bytearray(REGISTRY[:-32])
    for position, byte in changes:
        data[position] = byte
    try:
        registry = Registry.from_bytes(sealed(bytes(data)))
    except FormatError:
        return
    registry.validate()
    assert Registry.from_bytes(registry.to_bytes()) == registry


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_bytes_of_any_kind_are_refused(data: bytes) -> None:
    for load in (Registry.from_bytes, lambda data: Registry.from_bytes(b"MOSESREG\x01\x00" + data)):
        with pytest.raises(FormatError):
            load(data)


def make_run(folder: Path) -> str:
    with Store.create(folder / "run") as store:
        store.commit({"config.json": b"{}", "tasks/000-a/adapter.bin": b"abcd"})
    return (folder / "run" / "manifest.json").read_text()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path, position: int, bit: int) -> None:
    path = tmp_path / "run" / "manifest.json"
    text = (tmp_path / "manifest").read_text() if (tmp_path / "manifest").exists() else make_run(tmp_path)
    (tmp_path / "manifest").write_text(text)
    data = bytearray(text.encode())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)
    try:
        with Store.open(tmp_path / "run") as store:
            files = {name: store.read(name) for name in store.files()}
    except FormatError:
        return
    assert text[position % len(text)].isspace(), "only white space may change without a word"
    assert files == {"config.json": b"{}", "tasks/000-a/adapter.bin": b"abcd"}


@pytest.mark.parametrize(
    "path",
    ["../secret", "/etc/hostname", "tasks/../../secret", "a\0b", "", ".", "..", ".lock", "tasks//x", "tasks/./x"],
)
def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path, path: str) -> None:
    """The checksum would refuse it too; the rule for paths must hold by itself."""
    manifest = json.loads(make_run(tmp_path))
    (tmp_path / "secret").write_text("{}")
    for where in ("path", "name"):
        changed = json.loads(json.dumps(manifest))
        info = changed["files"].pop("config.json")
        if where == "path":
            changed["files"]["config.json"] = info | {"path": path}
        else:
            changed["files"][path] = info
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(FormatError, match="is not usable"):
            Store.open(tmp_path / "run")


def test_links_in_a_run_are_not_followed(tmp_path: Path) -> None:
    make_run(tmp_path)
    run = tmp_path / "run"
    (tmp_path / "secret").write_text("abcd")
    (run / "tasks" / "000-a" / "adapter.bin").unlink()
    (run / "tasks" / "000-a" / "adapter.bin").symlink_to(tmp_path / "secret")
    with Store.open(run, write=True) as store:
        with pytest.raises(FormatError):
            store.read("tasks/000-a/adapter.bin")
        store.commit({"tasks/000-a/adapter.bin": b"new"})
    assert (tmp_path / "secret").read_text() == "abcd"
    (run / "manifest.json").rename(tmp_path / "manifest")
    (run / "manifest.json").symlink_to(tmp_path / "manifest")
    with pytest.raises(FormatError, match="regular file"):
        Store.open(run)
    (run / "manifest.json").unlink()
    (tmp_path / "manifest").rename(run / "manifest.json")
    (run / ".lock").unlink()
    (run / ".lock").symlink_to(tmp_path / "new-file")
    with pytest.raises(OSError):
        Store.open(run, write=True)
    assert not (tmp_path / "new-file").exists()


def test_a_run_of_a_later_version_says_so(tmp_path: Path) -> None:
    manifest = json.loads(make_run(tmp_path)) | {"version": 2, "new": {}}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="install a newer moses") as caught:
        Store.open(tmp_path / "run")
    assert caught.value.code == "format_version"


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"format":"moses-run"}', "\x00", "[" * 100_000, '{"a":' * 100_000]
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    make_run(tmp_path)
    (tmp_path / "run" / "manifest.json").write_text(text)
    with pytest.raises(FormatError, match="not a valid manifest") as caught:
        Store.open(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_folder_in_place_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(FormatError, match="regular file"):
        Store.open(tmp_path)
    with pytest.raises(MosesError) as caught:
        Store.create(tmp_path)
    assert isinstance(caught.value, StoreError)
