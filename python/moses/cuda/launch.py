"""A device's kernels, loaded once a process, and a launch on torch's current stream. Nothing here waits for the device.

All kernels of a device are loaded at its first op, so that whatever comes later may be captured into a CUDA graph. Launches go to the device's
primary context, which is torch's, whatever thread they come from: a thread that has not used CUDA yet, as autograd's, has none of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import KernelError
from .compile import MEND, cubin
from .names import KERNELS

MAX_BLOCKS = 1 << 16  # of a grid; kernels take what is more in turn


@dataclass(frozen=True)
class Loaded:
    """What a device runs: its primary context, and functions by the kernel's name."""

    context: Any
    functions: Mapping[str, Any]


_devices: dict[int, Loaded | str] = {}  # or why there are none
_warned = False
_lock = threading.Lock()


def available(device: torch.device) -> bool:
    """Whether the kernels serve a CUDA device; the first call loads them, which may compile them (seconds, once a machine).

    Where they cannot be had a `RuntimeWarning` says why, once a process.

    Raises:
        KernelError: they would have to be loaded while a CUDA graph is captured (`cuda_capture`).
    """
    index = _index(device)
    if index not in _devices:
        with _lock:
            if index not in _devices:
                _devices[index] = _try_load(index)
    return isinstance(_devices[index], Loaded)


def why_not(device: torch.device) -> str | None:
    """Why plain torch serves a device; None where the kernels do. Loads them as `available` does, and warns of nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        available(device)
    found = _devices[_index(device)]
    return found if isinstance(found, str) else None


def launch(
    kernel: str, blocks: int, threads: tuple[int, int], device: torch.device, *arguments: Tensor | int | None
) -> None:
    """Start `kernel` on the current stream of `device`, whose kernels are `available`.

    Args:
        kernel: its name in `names.KERNELS`.
        blocks: of the grid, at most `MAX_BLOCKS` are started.
        threads: of a block: blockDim.x and blockDim.y.
        arguments: tensors (or None) as pointers, ints as int64.

    Raises:
        KernelError: the driver refuses; often the answer to an earlier error of the device (`cuda_launch`).
    """
    loaded = _devices[_index(device)]
    assert isinstance(loaded, Loaded), "launch() before available()"
    driver = _driver()
    values = tuple(argument.data_ptr() if isinstance(argument, Tensor) else argument or 0 for argument in arguments)
    types = tuple(ctypes.c_int64 if isinstance(argument, int) else ctypes.c_void_p for argument in arguments)
    function, stream = loaded.functions[kernel], _stream(device)
    pushed = int(_check(driver.cuCtxGetCurrent())) != int(loaded.context)
    if pushed:
        _check(driver.cuCtxPushCurrent(loaded.context))
    try:
        grid = (min(blocks, MAX_BLOCKS), 1, 1)
        _check(driver.cuLaunchKernel(function, *grid, *threads, 1, 0, stream, (values, types), 0), kernel)
    finally:
        if pushed:
            _check(driver.cuCtxPopCurrent())


def _try_load(index: int) -> Loaded | str:
    global _warned
    if _capturing():
        raise KernelError(
            f"the kernels of cuda:{index} are not loaded yet and cannot be while a CUDA graph is captured; run the op once before the capture",
            code="cuda_capture",
        )
    try:
        return _load(index)
    except KernelError as error:
        reason = str(error)
    if not _warned:
        _warned = True
        warnings.warn(f"moses runs on plain torch instead of its CUDA kernels: {reason}", RuntimeWarning, stacklevel=4)
    return reason


def _load(index: int) -> Loaded:
    code = {source: cubin(source, _architecture(index)) for source in KERNELS}
    driver = _driver()
    try:
        _check(driver.cuInit(0))
        context = _check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(index))))
        _check(driver.cuCtxPushCurrent(context))
    except RuntimeError as error:  # no libcuda behind the bindings
        raise KernelError(f"the CUDA driver does not load ({error}); {MEND}", code="cuda_unavailable") from None
    try:
        functions = {}
        for source, kernels in KERNELS.items():
            module = _check(driver.cuModuleLoadData(code[source]))
            for kernel in kernels:
                functions[kernel] = _check(driver.cuModuleGetFunction(module, kernel.encode()), kernel)
                _finish_loading(driver, functions[kernel])
        return Loaded(context, functions)
    finally:
        driver.cuCtxPopCurrent()


def _finish_loading(driver: Any, function: Any) -> None:
    # Lazy loading would put it off to the first launch, which may be captured. Drivers before CUDA 12.4 do not have the call.
    with contextlib.suppress(AttributeError, RuntimeError):
        driver.cuFuncLoad(function)


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise KernelError(f"the driver's bindings are not there ({error}); {MEND}", code="cuda_unavailable") from None
    return driver


def _check(answer: tuple[Any, ...], kernel: str | None = None) -> Any:
    status, *values = answer
    if int(status) != 0:
        what = "the CUDA driver failed" if kernel is None else f"the CUDA driver refuses {kernel}"
        raise KernelError(f"{what}: {status.name}", code="cuda_launch")
    return values[0] if values else None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream)


def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def _capturing() -> bool:
    return bool(torch.cuda.is_current_stream_capturing())
