"""CUDA source to a cubin for the very device, by the NVRTC that torch's CUDA wheels bring, kept in the user's cache.

A cubin and not PTX: an older driver refuses the PTX of a newer NVRTC. The cache is keyed by source, architecture, options and NVRTC's version; a file
in it opens with the hash of its content, and one that does not fit is compiled again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .. import _core
from ..errors import ModelError

OPTIONS = ("--std=c++17", "--fmad=false", "-default-device")  # products are rounded before they are added
HASH_CHARACTERS = 64


def cache_folder() -> Path:
    """Where cubins are kept: `$XDG_CACHE_HOME/moses/kernels`, by default under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "moses" / "kernels"


def cubin(name: str, architecture: str, folder: Path | None = None) -> bytes:
    """The machine code of source `name` (`dispatch`, `combine`) for an architecture as `sm_90`.

    Raises:
        ModelError: NVRTC is not there or refuses the source (`cuda_unavailable`).
    """
    source = _core.cuda_source(name)
    key = _core.blake3_hex("\0".join([source, architecture, *OPTIONS, version()]).encode())
    path = (folder or cache_folder()) / f"{name}-{architecture}-{key[:32]}.cubin"
    try:
        held = path.read_bytes()
    except OSError:
        held = b""
    body = held[HASH_CHARACTERS:]
    if body and held[:HASH_CHARACTERS] == _core.blake3_hex(body).encode():
        return body
    body, _ = compile_source(source, name, architecture)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _core.atomic_write(path, _core.blake3_hex(body).encode() + body)
    except OSError:
        pass  # a cache that cannot be written costs a second at the next start
    return body


def compile_source(source: str, name: str, architecture: str) -> tuple[bytes, str]:
    """Machine code for `sm_NN`, PTX for `compute_NN`, and what NVRTC had to say. Raises as `cubin`."""
    nvrtc = _nvrtc()
    program = _call(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    log = b" " * _call(nvrtc.nvrtcGetProgramLogSize(program))
    _call(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode().strip("\0 \n")
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise ModelError(f"NVRTC refuses {name}.cu for {architecture}: {text}", code="cuda_unavailable")
    native = architecture.startswith("sm_")
    size, get = (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if native else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    code = b" " * _call(size(program))
    _call(get(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code, text


def version() -> str:
    """NVRTC's version, `MAJOR.MINOR`. Raises as `cubin`."""
    major, minor = _call(_nvrtc().nvrtcVersion())
    return f"{major}.{minor}"


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise ModelError(
            f"NVRTC is not there ({error}); torch's CUDA wheels bring it: pip install torch", code="cuda_unavailable"
        ) from None
    return nvrtc


def _call(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status) != 0:
        raise ModelError(f"NVRTC failed: {status.name}", code="cuda_unavailable")
    return values[0] if len(values) == 1 else tuple(values)
