"""A cubin as a module of a device, and a kernel on torch's current stream. Nothing here waits for the device.

A module is loaded once a device and process; kernels of a module that is loaded may be captured into a CUDA graph, so run the op once before.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .compile import cubin

THREADS = 256
MAX_BLOCKS = 1 << 16

_functions: dict[tuple[int, str, str], Any] = {}
_lock = threading.Lock()


def launch(source: str, kernel: str, work: int, device: torch.device, *arguments: Tensor | int | None) -> None:
    """Start `kernel` with about one block an item of `work`, on the current stream of `device`.

    Args:
        source: `dispatch` or `combine`.
        work: items that blocks take in turn; with none nothing is started.
        arguments: tensors (or None) as pointers, ints as int64.

    Raises:
        ModelError: the kernel cannot be compiled, loaded or started (`cuda_unavailable`).
    """
    if not work:
        return
    driver = _driver()
    with torch.cuda.device(device):
        function = _function(torch.cuda.current_device(), source, kernel)
        values = tuple(
            argument if isinstance(argument, int) else 0 if argument is None else argument.data_ptr()
            for argument in arguments
        )
        types = tuple(ctypes.c_int64 if isinstance(argument, int) else ctypes.c_void_p for argument in arguments)
        stream = torch.cuda.current_stream().cuda_stream
        blocks = min(work, MAX_BLOCKS)
        _check(driver.cuLaunchKernel(function, blocks, 1, 1, THREADS, 1, 1, 0, stream, (values, types), 0))


def _function(device: int, source: str, kernel: str) -> Any:
    key = (device, source, kernel)
    if key not in _functions:
        with _lock:
            if key not in _functions:
                if torch.cuda.is_current_stream_capturing():
                    raise ModelError(
                        f"{kernel} is loaded for the first time while a CUDA graph is captured; run the op once before",
                        code="cuda_unavailable",
                    )
                major, minor = torch.cuda.get_device_capability(device)
                driver = _driver()
                module = _check(driver.cuModuleLoadData(cubin(source, f"sm_{major}{minor}")))
                _functions[key] = _check(driver.cuModuleGetFunction(module, kernel.encode()))
    return _functions[key]


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ModelError(
            f"cuda-bindings is not there ({error}); torch's CUDA wheels bring it", code="cuda_unavailable"
        ) from None
    return driver


def _check(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status) != 0:
        raise ModelError(f"the CUDA driver failed: {status.name}", code="cuda_unavailable")
    return values[0] if values else None
