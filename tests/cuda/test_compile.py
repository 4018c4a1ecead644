"""NVRTC takes the sources for every generation, with no device and no driver; the cache holds cubins that are what they say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from moses import _core
from moses.cuda import compile as compiling
from moses.cuda.names import KERNELS
from moses.errors import KernelError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def _nvrtc():
    try:
        compiling.version()
    except KernelError as error:
        pytest.skip(f"no NVRTC: {error}")


def test_the_extension_carries_the_sources_of_this_tree():
    begin = (ROOT / "cuda" / "device.cuh").read_text()
    for name in KERNELS:
        assert _core.cuda_source(name) == f"{begin}\n" + (ROOT / "cuda" / f"{name}.cu").read_text()
    assert {path.stem for path in (ROOT / "cuda").iterdir()} == {"device", *KERNELS}
    with pytest.raises(KeyError):
        _core.cuda_source("../secrets")


@pytest.mark.usefixtures("_nvrtc")
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
@pytest.mark.parametrize("name", list(KERNELS))
def test_nvrtc_takes_the_sources_for_every_generation(name, architecture):
    source = _core.cuda_source(name)
    ptx, log = compiling.compile_source(source, name, f"compute_{architecture}")
    text = ptx.decode()
    assert not log
    assert set(re.findall(r"\.entry (\w+)", text)) == set(KERNELS[name])
    # no atomics, no waiting for other threads, no product that is not rounded, the message of what is refused
    assert not re.search(r"\b(atom|red|bar|barrier|fma)\.", text) and "__assertfail" in text
    code, log = compiling.compile_source(source, name, f"sm_{architecture}", "--ptxas-options=-v")
    assert code[:4] == b"\x7fELF" and "warning" not in log
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log) == [
        ("0",) * 3
    ] * len(KERNELS[name])
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == len(KERNELS[name]) and max(registers) <= 128


@pytest.mark.usefixtures("_nvrtc")
def test_an_empty_log_is_written_to_no_object_that_python_shares():
    _, log = compiling.compile_source("__global__ void nothing() {}", "nothing", "compute_90")
    assert not log
    assert [bytes([value])[0] for value in range(256)] == list(range(256))


@pytest.mark.usefixtures("_nvrtc")
def test_rows_are_read_and_written_16_bytes_at_a_time():
    ptx, _ = compiling.compile_source(_core.cuda_source("combine"), "combine", "compute_90")
    bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n\}", ptx.decode(), re.DOTALL))
    for kernel in ("gather_16_int32", *(f"{step}_bfloat16_x8_int64" for step in ("combine", "scale", "dot"))):
        assert re.search(r"ld\.global(\.nc)?\.v4\.[bu]32", bodies[kernel]), kernel
        assert re.search(r"st\.global\.v4\.", bodies[kernel]), kernel


@pytest.mark.usefixtures("_nvrtc")
def test_the_cache_is_used_and_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    first = compiling.cubin("dispatch", "sm_90", tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    compiled = []
    monkeypatch.setattr(
        compiling, "compile_source", lambda *args: compiled.append(args) or (b"code of " + args[2].encode(), "")
    )
    assert compiling.cubin("dispatch", "sm_90", tmp_path) == first and not compiled
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damage in (b"", b"x" * 100, whole[:-1], whole + b"\0", whole[:64], bytes(flipped), _sealed(b"another's")):
        compiled.clear()
        file.write_bytes(damage)
        assert compiling.cubin("dispatch", "sm_90", tmp_path) == b"code of sm_90" and len(compiled) == 1
        assert compiling.cubin("dispatch", "sm_90", tmp_path) == b"code of sm_90" and len(compiled) == 1
    # a file that is whole, but of another architecture
    compiling.cubin("dispatch", "sm_80", tmp_path)
    (other,) = set(tmp_path.iterdir()) - {file}
    other.write_bytes(whole)
    assert compiling.cubin("dispatch", "sm_80", tmp_path) == b"code of sm_80"


def _sealed(code):
    return _core.blake3_hex(code).encode() + code


@pytest.mark.usefixtures("_nvrtc")
def test_every_input_of_a_cubin_is_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "compile_source", lambda *args: (b"code", ""))
    compiling.cubin("dispatch", "sm_90", tmp_path)
    compiling.cubin("dispatch", "sm_80", tmp_path)
    compiling.cubin("combine", "sm_90", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "version", lambda: "99.0")
        compiling.cubin("dispatch", "sm_90", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(compiling, "OPTIONS", (*compiling.OPTIONS, "--use_fast_math"))
        compiling.cubin("dispatch", "sm_90", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(_core, "cuda_source", lambda name: "other text")
        compiling.cubin("dispatch", "sm_90", tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.usefixtures("_nvrtc")
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "compile_source", lambda *args: (b"code", ""))
    (tmp_path / "file").write_bytes(b"")
    assert compiling.cubin("dispatch", "sm_90", tmp_path / "file" / "folder") == b"code"


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiling.cache_folder() == tmp_path / "moses" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiling.cache_folder() == Path.home() / ".cache" / "moses" / "kernels"


@pytest.mark.usefixtures("_nvrtc")
def test_what_nvrtc_refuses_is_said():
    with pytest.raises(KernelError, match=r"refuses broken\.cu for sm_90 .*error") as caught:
        compiling.compile_source("not C++", "broken", "sm_90")
    assert caught.value.code == "cuda_unavailable"
    with pytest.raises(KernelError, match="for sm_999"):
        compiling.compile_source("", "empty", "sm_999")


def test_no_nvrtc_is_said_with_the_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match=r"bindings are not there.*pip install") as caught:
        compiling.version()
    assert caught.value.code == "cuda_unavailable"

    class Nvrtc:
        def nvrtcVersion(self):
            raise RuntimeError("libnvrtc.so.13: cannot open")

    monkeypatch.setattr(compiling, "_nvrtc", Nvrtc)
    with pytest.raises(KernelError, match=r"does not load.*libnvrtc.*pip install"):
        compiling.version()
