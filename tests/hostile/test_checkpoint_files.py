"""Checkpoints that are one fault away from one that prunes: each is a typed error in one line, and nothing is left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moses import surgery
from moses.cli import main
from moses.errors import MosesError, SurgeryError

Header = dict[str, Any]
GATE = "model.layers.0.block_sparse_moe.gate.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_shard(path: Path, header: Header | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def read_shard(path: Path) -> tuple[Header, bytes]:
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def make(folder: Path, top_k: int = 2) -> Path:
    """A Mixtral of one layer and four experts in two shards, made by hand."""
    folder.mkdir(parents=True)
    block = "model.layers.0.block_sparse_moe"
    parts = [{"model.embed_tokens.weight": [8, 4], GATE: [4, 4]}, {}]
    for expert in range(4):
        shard = parts[expert // 2]
        for name, shape in (("w1", [3, 4]), ("w2", [4, 3]), ("w3", [3, 4])):
            shard[f"{block}.experts.{expert}.{name}.weight"] = shape
    weight_map = {}
    for name, tensors in zip(SHARDS, parts, strict=True):
        header: Header = {"__metadata__": {"format": "pt"}}
        data = b""
        for tensor, (rows, columns) in tensors.items():
            size = rows * columns * 4
            header[tensor] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [len(data), len(data) + size]}
            data += os.urandom(size)
            weight_map[tensor] = name
        write_shard(folder / name, header, data)
    save_index(folder, weight_map)
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": top_k, "hidden_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def save_index(folder: Path, weight_map: dict[str, str]) -> None:
    document = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return found


def indexed(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        names = weight_map(folder)
        change(names)
        save_index(folder, names)

    return damage


def renamed(to: str) -> Callable[[Path], None]:
    return indexed(lambda names: names.update({name: to for name, shard in names.items() if shard == SHARDS[1]}))


def headed(change: Callable[[Header], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        header, data = read_shard(folder / SHARDS[0])
        change(header)
        write_shard(folder / SHARDS[0], header, data)

    return damage


def raw(change: Callable[[bytes], bytes], name: str = SHARDS[0]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def linked(name: str, to: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        target = folder.parent / "outside"
        target.mkdir()
        if (folder / name).exists():
            shutil.move(folder / name, target / "file")
        (folder / name).symlink_to(to.format(outside=target))

    return damage


def doubled(name: str, key: str, value: str) -> Callable[[Path], None]:
    """A key that is there once more, in front."""

    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        place = text.index("{", text.index("weight_map")) + 1 if "weight_map" in text and key != "weight_map" else 1
        (folder / name).write_text(f"{text[:place]}{json.dumps(key)}: {value}, {text[place:]}")

    return damage


def header_doubled(key: str, value: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        header, data = read_shard(folder / SHARDS[0])
        write_shard(
            folder / SHARDS[0], f"{{{json.dumps(key)}: {value}, ".encode() + json.dumps(header).encode()[1:], data
        )

    return damage


def pickled(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / SHARDS[1]).rename(folder / name)
        renamed(name)(folder)

    return damage


def only_pickles(folder: Path) -> None:
    for name in (*SHARDS, "model.safetensors.index.json"):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def experts(change: Callable[[dict[str, list[int]]], object]) -> Callable[[Path], None]:
    """Other shapes, with data that fits them."""

    def damage(folder: Path) -> None:
        names = {}
        for shard in SHARDS:
            header, _ = read_shard(folder / shard)
            shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
            change(shapes)
            end = 0
            fresh: Header = {}
            for name, shape in shapes.items():
                size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
                fresh[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
                end += size
                names[name] = shard
            write_shard(folder / shard, fresh, bytes(end))
        save_index(folder, names)

    return damage


def reshape(name: str, shape: list[int]) -> Callable[[dict[str, list[int]]], object]:
    return lambda shapes: shapes.update({name: shape}) if name in shapes else None


EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
FIRST = "model.embed_tokens.weight"
MORE = '{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
BIG = 1 << 40

FAULTS: dict[str, tuple[str, list[Callable[[Path], object]]]] = {
    "paths in the index": (
        "shard_path",
        [renamed("../x.safetensors"), renamed("/etc/x.safetensors"), renamed("a/../../x.safetensors"), renamed("..")],
    ),
    "links out of the folder": (
        "shard_path",
        [
            linked(SHARDS[1], "{outside}/file"),
            linked("config.json", "../outside/file"),
            linked("vocab.txt", "/etc/hostname"),
            linked(SHARDS[0], "nothing"),
        ],
    ),
    "missing shards": (
        "shard_missing",
        [
            lambda f: (f / SHARDS[0]).unlink(),
            lambda f: (f / SHARDS[1]).unlink(),
            renamed("model-00003-of-00002.safetensors"),
        ],
    ),
    "extra shards": (
        "shard_extra",
        [
            lambda f: shutil.copy(f / SHARDS[0], f / "model.safetensors"),
            lambda f: shutil.copy(f / SHARDS[0], f / "model-00003-of-00003.safetensors"),
            lambda f: (f / "consolidated.safetensors").write_bytes(b""),
        ],
    ),
    "tensors that a shard lacks": (
        "tensor_missing",
        [
            indexed(lambda names: names.update({"lm_head.weight": SHARDS[0]})),
            indexed(lambda names: names.update({"model.norm.weight": SHARDS[1]})),
            indexed(lambda names: names.update({EXPERT.format(4): SHARDS[1]})),
        ],
    ),
    "tensors that the index lacks": (
        "tensor_unlisted",
        [
            indexed(lambda names: names.pop(GATE)),
            indexed(lambda names: names.pop(FIRST)),
            indexed(lambda names: names.pop(EXPERT.format(3))),
            indexed(lambda names: names.update({EXPERT.format(3): SHARDS[0]})),
        ],
    ),
    "overlapping offsets": (
        "safetensors_invalid",
        [
            headed(lambda h: h[GATE].update(data_offsets=[64, 128])),
            headed(lambda h: h[FIRST].update(data_offsets=[4, 132])),
            headed(lambda h: h.update(more={"dtype": "U8", "shape": [4], "data_offsets": [0, 4]})),
        ],
    ),
    "holes": (
        "safetensors_invalid",
        [
            headed(lambda h: h.pop(GATE)),
            headed(lambda h: h.pop(FIRST)),
            raw(lambda b: b + b"1234"),
            headed(lambda h: h.pop(EXPERT.format(1))),
        ],
    ),
    "header lengths": (
        "safetensors_invalid",
        [raw(lambda b, n=n: n.to_bytes(8, "little") + b[8:]) for n in (2**64 - 1, 2**63, 2**32, 100_000_001, 3)],
    ),
    "keys that are there twice": (
        "safetensors_invalid",
        [header_doubled(GATE, MORE), header_doubled("__metadata__", "{}"), header_doubled(FIRST, MORE)],
    ),
    "keys that are there twice in JSON": (
        "checkpoint_invalid",
        [
            doubled("model.safetensors.index.json", GATE, json.dumps(SHARDS[0])),
            doubled("config.json", "num_local_experts", "4"),
            doubled("model.safetensors.index.json", "weight_map", "{}"),
        ],
    ),
    "shapes that overflow": (
        "safetensors_invalid",
        [
            headed(lambda h, s=s: h[GATE].update(shape=s))
            for s in ([BIG, BIG], [2**63, 2, 4], [2**64 - 1, 2**64 - 1], [BIG] * 16)
        ],
    ),
    "dtypes of another size": (
        "safetensors_invalid",
        [headed(lambda h, d=d: h[GATE].update(dtype=d)) for d in ("F16", "F64", "U8", "F99")],
    ),
    "truncated files": (
        "safetensors_invalid",
        [raw(lambda b: b[:-1]), raw(lambda b: b[:100]), raw(lambda b: b[:7]), raw(lambda b: b"")],
    ),
    "truncated JSON": (
        "checkpoint_invalid",
        [
            raw(lambda b: b[:-2], "model.safetensors.index.json"),
            raw(lambda b: b[:20], "config.json"),
            raw(lambda b: b"", "config.json"),
        ],
    ),
    "pickles": (
        "weights_pickled",
        [pickled("pytorch_model-00002-of-00002.bin"), pickled("model.pt"), only_pickles],
    ),
    "gates and experts": (
        "experts_misfit",
        [
            experts(reshape(GATE, [5, 4])),
            experts(reshape(GATE, [3, 4])),
            experts(reshape(EXPERT.format(2), [5, 4])),
            experts(lambda shapes: shapes.pop(EXPERT.format(3), None)),
            experts(lambda shapes: shapes.pop(GATE, None)),
            experts(lambda shapes: [shapes.pop(name) for name in list(shapes) if ".experts.1." in name]),
        ],
    ),
    "experts and config": (
        "checkpoint_invalid",
        [
            raw(lambda b: b.replace(b'experts": 4', b'experts": 8'), "config.json"),
            raw(lambda b: b.replace(b'experts": 4', b'experts": "4"'), "config.json"),
            raw(lambda b: b.replace(b"num_local_experts", b"num_lokal_experts"), "config.json"),
        ],
    ),
}
CASES = [(name, n) for name, (_, damages) in FAULTS.items() for n in range(len(damages))]


def prune(source: Path, out: Path, keep: str = "0,3") -> int:
    return main(["prune", str(source), "--keep", keep, "--out", str(out), "--json"])


def test_what_is_not_damaged_prunes(tmp_path, capsys):
    assert prune(make(tmp_path / "source"), tmp_path / "out") == 0
    assert json.loads(capsys.readouterr().out)["tensors"]["renamed"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert all(len(damages) >= 3 for _, damages in FAULTS.values())


@pytest.mark.parametrize(("name", "number"), CASES)
def test_a_fault_is_an_error_and_leaves_nothing(name, number, tmp_path, capsys):
    code, damages = FAULTS[name]
    source = make(tmp_path / "source")
    damages[number](source)
    before = {path.name for path in tmp_path.iterdir()}
    start = time.perf_counter()
    with pytest.raises(MosesError) as caught:
        surgery.prune(source, tmp_path / "out", keep=[0, 3])
    assert time.perf_counter() - start < 1
    assert caught.value.code == code, caught.value
    assert prune(source, tmp_path / "out") == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and told.err.startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("top_k", "keep"), [(3, "0,1"), (2, "3"), (4, "0-2")])
def test_more_experts_a_token_than_are_left(top_k, keep, tmp_path, capsys):
    source = make(tmp_path / "source", top_k=top_k)
    assert prune(source, tmp_path / "out", keep) == 2
    assert "a token uses" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("where", ["source/out", "source/../source/out", "link/out"])
def test_an_output_inside_the_input(where, tmp_path):
    source = make(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    before = {path.name for path in source.iterdir()}
    with pytest.raises(SurgeryError) as caught:
        surgery.prune(source, tmp_path / where, keep=[0, 1])
    assert caught.value.code == "output_inside"
    assert {path.name for path in source.iterdir()} == before


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_an_output_that_is_there(kind, tmp_path):
    source, out = make(tmp_path / "source"), tmp_path / "out"
    {"folder": out.mkdir, "file": out.touch, "link": lambda: out.symlink_to("nowhere")}[kind]()
    with pytest.raises(SurgeryError) as caught:
        surgery.prune(source, out, keep=[0, 1])
    assert caught.value.code == "output_exists"


def limited(source: Path, out: Path, set_up: str) -> subprocess.CompletedProcess[str]:
    """A prune in a process of its own, limited first."""
    code = f"{set_up}\nfrom moses.cli import main\nraise SystemExit(main(['prune', {str(source)!r}, '--keep', '0,3', '--out', {str(out)!r}]))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("bytes_allowed", [0, 100, 700])
def test_a_full_target(bytes_allowed, tmp_path):
    """Files may not grow over a size: what a full disk says in the middle of a write."""
    source = make(tmp_path / "source")
    limit = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_allowed},) * 2)"
    )
    done = limited(source, tmp_path / "out", limit)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("where", ["/proc/out", "/dev/null/out", "/sys/out"])
def test_a_target_that_cannot_be_written(where, tmp_path):
    done = limited(make(tmp_path / "source"), Path(where), "pass")
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_target(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o555)
    with pytest.raises(PermissionError):
        surgery.prune(make(tmp_path / "source"), tmp_path / "folder" / "out", keep=[0, 1])


def hub(tmp_path: Path) -> Path:
    """The snapshot of a hub cache: links to blobs."""
    source = make(tmp_path / "made")
    root = tmp_path / "models--x--y"
    snapshot = root / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        blob = root / "blobs" / f"{number:040x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    source.rmdir()
    return snapshot


def test_a_hub_cache_works_and_its_blobs_are_never_changed(tmp_path):
    snapshot = hub(tmp_path)
    blobs = {path: path.read_bytes() for path in (snapshot.parents[1] / "blobs").iterdir()}
    done = surgery.prune(snapshot, tmp_path / "out", keep=[0, 3], writing=surgery.Writing(link=True))
    assert surgery.verify(done.path, snapshot).ok
    assert not any(path.is_symlink() for path in done.path.iterdir())
    surgery.grow(snapshot, add=1, writing=surgery.Writing(in_place=True))
    assert surgery.open_checkpoint(snapshot).facts.num_experts == {"model.layers.0": 5}
    assert {path: path.read_bytes() for path in blobs} == blobs
    assert (snapshot / SHARDS[0]).is_symlink() or (snapshot / SHARDS[1]).is_symlink()


@pytest.mark.parametrize("target", ["../../other/file", "../../../outside", "/etc/hostname"])
def test_links_of_a_hub_cache_lead_to_its_blobs_only(target, tmp_path):
    snapshot = hub(tmp_path)
    for place in ("models--x--y/other/file", "outside"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(b"{}")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(target)
    with pytest.raises(MosesError) as caught:
        surgery.prune(snapshot, tmp_path / "out", keep=[0, 3])
    assert caught.value.code == "shard_path"


def test_other_weights_and_folders_are_not_carried_in_silence(tmp_path):
    source = make(tmp_path / "source")
    (source / "model.gguf").write_bytes(b"x")
    (source / "original").mkdir()
    done = surgery.prune(source, tmp_path / "out", keep=[0, 3])
    assert any("model.gguf" in note and "original/" in note for note in done.description["notes"])


def test_unknown_tensors_of_gates_and_experts_are_refused(tmp_path):
    for stray in ("gate.weight_scale", "gate.lora"):
        source = make(tmp_path / stray)
        experts(
            lambda shapes, s=stray: (
                shapes.update({f"model.layers.0.block_sparse_moe.{s}": [4]}) if GATE in shapes else None
            )
        )(source)
        with pytest.raises(SurgeryError) as caught:
            surgery.prune(source, tmp_path / "out", keep=[0, 3])
        assert caught.value.code == "tensor_unknown"


def test_modes_follow_the_umask_and_times_are_kept(tmp_path):
    source = make(tmp_path / "source")
    os.utime(source / "tokenizer.json", (1_000_000_000, 1_000_000_000))
    old = os.umask(0o027)
    try:
        out = surgery.prune(source, tmp_path / "out", keep=[0, 3]).path
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert out.stat().st_mode & 0o777 == 0o750
    assert (out / "tokenizer.json").stat().st_mtime == 1_000_000_000
    header, _ = read_shard(out / SHARDS[0])
    assert header["__metadata__"] == {"format": "pt"}


def test_a_hostile_header_costs_no_memory(tmp_path):
    source = make(tmp_path / "source")
    (source / SHARDS[0]).write_bytes((16 << 20).to_bytes(8, "little") + b'{"a":' + b"[" * (16 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(MosesError):
        surgery.prune(source, tmp_path / "out", keep=[0, 3])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
