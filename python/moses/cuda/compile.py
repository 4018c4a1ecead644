"""CUDA source to a cubin for the very device, by the NVRTC that torch's CUDA wheels bring, kept in the user's cache.

A cubin and not PTX: an older driver refuses the PTX of a newer NVRTC. A file of the cache is named by the hash of source, architecture, options and
NVRTC's version, and opens with a hash over that name and its content: a damaged file, or another's, is compiled again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import _core
from ..errors import KernelError

OPTIONS = ("--std=c++17", "--fmad=false", "-default-device")  # products are rounded before they are added
SEAL = 64  # characters of a hash

MEND = "torch's CUDA wheels bring both, or: pip install cuda-bindings nvidia-cuda-nvrtc"


def cache_folder() -> Path:
    """Where cubins are kept: `$XDG_CACHE_HOME/moses/kernels`, by default under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "moses" / "kernels"


def cubin(name: str, architecture: str, folder: Path | None = None) -> bytes:
    """The machine code of source `name` (`dispatch`, `combine`) for an architecture as `sm_90`, kept in `folder`.

    Raises:
        KernelError: NVRTC is not there or refuses the source (`cuda_unavailable`).
    """
    source = _core.cuda_source(name)
    key = _core.blake3_hex("\0".join([source, architecture, *OPTIONS, version()]).encode())
    path = (folder or cache_folder()) / f"{name}-{architecture}-{key[:32]}.cubin"
    try:
        held = path.read_bytes()
    except OSError:
        held = b""
    code = held[SEAL:]
    if code and held[:SEAL] == _seal(key, code):
        return code
    code, _ = compile_source(source, name, architecture)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _core.atomic_write(path, _seal(key, code) + code)
    except OSError:
        pass  # a cache that cannot be written costs a second at the next start
    return code


def _seal(key: str, code: bytes) -> bytes:
    return _core.blake3_hex(key.encode() + code).encode()


def compile_source(source: str, name: str, architecture: str, *options: str) -> tuple[bytes, str]:
    """Machine code for `sm_NN`, PTX for `compute_NN`, and what NVRTC had to say. Raises as `cubin`."""
    nvrtc = _nvrtc()
    program = _call(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        given = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS, *options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        log = _filled(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        text = log.decode(errors="replace").strip("\0 \n")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelError(
                f"NVRTC {version()} refuses {name}.cu for {architecture} ({status.name}): {text[:500]}",
                code="cuda_unavailable",
            )
        if architecture.startswith("sm_"):
            code = _filled(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        else:
            code = _filled(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
        return code, text
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _filled(size: Any, get: Any, program: Any) -> bytes:
    """What `get` writes. A bytearray, since it writes in place: one byte of `bytes` is an object that all of Python shares."""
    memory = bytearray(_call(size(program)))
    _call(get(program, memory))
    return bytes(memory)


def version() -> str:
    """NVRTC's version, `MAJOR.MINOR`. Raises as `cubin`."""
    try:
        major, minor = _call(_nvrtc().nvrtcVersion())
    except RuntimeError as error:  # the library behind the bindings is loaded at the first call
        raise KernelError(f"NVRTC's library does not load ({error}); {MEND}", code="cuda_unavailable") from None
    return f"{major}.{minor}"


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError(f"NVRTC's bindings are not there ({error}); {MEND}", code="cuda_unavailable") from None
    return nvrtc


def _call(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status) != 0:
        raise KernelError(f"NVRTC failed: {status.name}", code="cuda_unavailable")
    return values[0] if len(values) == 1 else tuple(values)
