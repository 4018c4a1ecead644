"""The text of the CUDA kernels that rides in the extension, without a GPU: run on the host against the references, and compiled by NVRTC.

The host's compiler sees the very text under a shim; a kernel is called once a block and thread, in a random order, so that what depends on the
grid or on another thread shows.
"""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moses import _core
from moses.cuda import compile as compiling
from moses.cuda import kernels
from moses.errors import ModelError
from moses.ops.combine import combine_backward_weights_reference, combine_backward_y_reference, combine_reference
from moses.ops.gather import gather_backward_reference, gather_reference
from moses.plan import dispatch_plan_reference, index_dtype, num_rows

SHIM = Path(__file__).with_name("shim.h")
compiler = shutil.which("g++") or shutil.which("c++")
host = pytest.mark.skipif(compiler is None, reason="needs a C++ compiler (g++) to run the kernels on the host")


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("kernels"), {}
    for name in ("dispatch", "combine"):
        source = folder / f"{name}.cpp"
        source.write_text(f'#include "{SHIM}"\n' + _core.cuda_source(name))
        library = folder / f"{name}.so"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror"]
        subprocess.run([compiler, *flags, "-o", library, source], check=True)
        made[name] = ctypes.CDLL(str(library))
    return made


class Host:
    """Takes the place of `launch`: runs every block and thread of a small grid in a random order."""

    def __init__(self, libraries, blocks, threads, seed):
        self.libraries, self.blocks, self.threads, self.random = libraries, blocks, threads, random.Random(seed)

    def __call__(self, source, kernel, work, device, *arguments):
        if not work:
            return
        library = self.libraries[source]
        function = getattr(library, kernel)
        values = [
            ctypes.c_longlong(a) if isinstance(a, int) else ctypes.c_void_p(0 if a is None else a.data_ptr())
            for a in arguments
        ]
        places = [(block, thread) for block in range(self.blocks) for thread in range(self.threads)]
        self.random.shuffle(places)
        for block, thread in places:
            library.moses_place(*map(ctypes.c_longlong, (block, thread, self.blocks, self.threads)))
            function(*values)
        assert not library.moses_failed(), "an id out of range"


def use(libraries, blocks, threads, seed=0):
    kernels.launch = Host(libraries, blocks, threads, seed)


@pytest.fixture(autouse=True)
def _restore():
    before = kernels.launch
    yield
    kernels.launch = before


def same(found, wanted):
    return found.dtype == wanted.dtype and torch.equal(
        found.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)
    )


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))


@host
@given(
    st.data(),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 700),
    st.one_of(st.none(), st.integers(1, 90)),
    st.booleans(),
    GRIDS,
)
@settings(max_examples=60)
def test_the_plan_is_the_references(libraries, data, experts, top_k, tokens, capacity, pad, grid):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    ids = torch.randint(experts, (tokens, top_k), generator=generator)
    ids = ids.clamp(max=data.draw(st.integers(0, experts - 1)))
    pad = pad and capacity is not None
    rows = num_rows(ids.numel(), experts, capacity, pad)
    use(libraries, *grid)
    for dtype in (index_dtype(ids.numel(), rows), torch.int64):
        found = kernels.plan(ids, experts, capacity, pad, rows, dtype)
        wanted = dispatch_plan_reference(ids, experts, capacity, pad)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.long(), other.long())
        assert found[0].dtype == found[1].dtype == dtype


@host
@pytest.mark.parametrize("pairs", [255, 256, 257, 511, 512])
def test_nothing_behind_the_last_pair_is_read(libraries, pairs):
    memory = torch.full((pairs + 1, 1), -1)
    memory[:pairs] = torch.arange(pairs)[:, None] % 3
    use(libraries, 2, 2)
    order, *_ = kernels.plan(memory[:pairs], 3, None, False, pairs, torch.int32)
    assert torch.equal(order, dispatch_plan_reference(memory[:pairs], 3, None, False)[0])


@host
@pytest.mark.parametrize("bad", [-1, 4, 2**40])
def test_an_id_out_of_range_fails_the_stream(libraries, bad):
    ids = torch.zeros(600, 1, dtype=torch.int64)
    ids[555] = bad
    use(libraries, 2, 3)
    with pytest.raises(AssertionError, match="out of range"):
        kernels.plan(ids, 4, None, False, 600, torch.int32)


@host
@given(
    st.sampled_from(list(kernels.NAMES)),
    st.integers(0, 40),
    st.integers(1, 3),
    st.sampled_from([0, 1, 2, 3, 8, 16, 31, 32, 33, 40, 72]),
    st.one_of(st.none(), st.integers(1, 12)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    GRIDS,
)
@settings(max_examples=150)
def test_rows_have_the_references_bits(libraries, dtype, tokens, top_k, width, capacity, pad, shifted, wide, grid):
    generator = torch.Generator().manual_seed(tokens * 97 + width)
    ids = torch.randint(5, (tokens, top_k), generator=generator)
    order, inverse, _, _ = dispatch_plan_reference(ids, 5, capacity, pad and capacity is not None)
    if wide:
        order, inverse = order.long(), inverse.long()
    acc = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(rows):
        flat = torch.randn(rows * width + 1, generator=generator).to(dtype)
        return flat[1:].view(rows, width) if shifted else flat[:-1].view(rows, width)  # shifted: not at 16 bytes

    x, grad, y = draw(tokens), draw(tokens), draw(order.shape[0])
    weights = torch.randn(tokens, top_k, generator=generator).to(acc)
    use(libraries, *grid)
    assert same(kernels.gather(x, order, inverse, top_k), gather_reference(x, order, inverse, top_k))
    assert same(kernels.gather_backward(y, order, inverse, top_k), gather_backward_reference(y, order, inverse, top_k))
    assert same(kernels.combine(y, order, inverse, weights), combine_reference(y, order, inverse, weights))
    assert same(
        kernels.combine_backward_y(grad, order, inverse, weights),
        combine_backward_y_reference(grad, order, inverse, weights),
    )
    assert same(
        kernels.combine_backward_weights(grad, y, order, inverse, top_k),
        combine_backward_weights_reference(grad, y, order, inverse, top_k),
    )


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
@pytest.mark.parametrize("name", ["dispatch", "combine"])
def test_nvrtc_takes_the_sources_for_every_generation(name, architecture):
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC comes with torch's CUDA wheels on Linux")
    code, log = compiling.compile_source(_core.cuda_source(name), name, f"sm_{architecture}")
    assert code[:4] == b"\x7fELF" and not log
    ptx, log = compiling.compile_source(_core.cuda_source(name), name, f"compute_{architecture}")
    assert b".entry" in ptx and b"fma.rn" not in ptx and not log


def test_the_cache_is_used_and_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC comes with torch's CUDA wheels on Linux")
    first = compiling.cubin("dispatch", "sm_90", tmp_path)
    (file,) = tmp_path.iterdir()
    compiled = []
    original = compiling.compile_source
    monkeypatch.setattr(compiling, "compile_source", lambda *args: compiled.append(args) or original(*args))
    assert compiling.cubin("dispatch", "sm_90", tmp_path) == first and not compiled
    for damage in (b"", b"x" * 100, file.read_bytes()[:-1], file.read_bytes()[:64] + b"\0" + file.read_bytes()[65:]):
        compiled.clear()
        file.write_bytes(damage)
        assert compiling.cubin("dispatch", "sm_90", tmp_path) == first and len(compiled) == 1
    assert compiling.cubin("dispatch", "sm_80", tmp_path) != first and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ModelError, match="refuses"):
        compiling.compile_source("not C++", "broken", "sm_90")
    with pytest.raises(KeyError):
        _core.cuda_source("../secrets")


def test_plain_torch_serves_where_kernels_cannot_be_had_and_says_so_once(monkeypatch):
    monkeypatch.setattr(kernels, "_warned", False)

    def broken(*arguments):
        raise ModelError("no driver", code="cuda_unavailable")

    call = kernels.or_reference(broken, lambda x: x + 1)
    with pytest.warns(RuntimeWarning, match="plain torch instead of its CUDA kernels: no driver"):
        assert call(1) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(2) == 3
