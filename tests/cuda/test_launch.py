"""Loading and launching, with a driver that is made up: what it is asked, in which context, how often, and what happens where it fails."""

from __future__ import annotations

import ctypes
import enum
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from moses.cuda import kernels, launch
from moses.cuda.names import KERNELS
from moses.errors import KernelError

DEVICE = torch.device("cuda", 1)
CONTEXT, OTHER_CONTEXT, STREAM = 500, 77, 4242


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_ASSERT = 710


class Driver:
    """The calls of the CUDA driver that we make. `fails` names one that answers with an error."""

    def __init__(self):
        self.calls, self.stack, self.fails, self.launched = [], [OTHER_CONTEXT], {}, []

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append(name)
            if name in self.fails:
                return (self.fails[name], None)
            return (Status.CUDA_SUCCESS, *getattr(self, f"on_{name}", lambda *_: ())(*arguments))

        return call

    def on_cuDeviceGet(self, index):
        return (10 + index,)

    def on_cuDevicePrimaryCtxRetain(self, device):
        assert device == 11, "the device of the tensor, and no other"
        return (CONTEXT,)

    def on_cuCtxGetCurrent(self):
        return (self.stack[-1],)

    def on_cuCtxPushCurrent(self, context):
        self.stack.append(context)
        return ()

    def on_cuCtxPopCurrent(self):
        return (self.stack.pop(),)

    def on_cuModuleLoadData(self, code):
        assert self.stack[-1] == CONTEXT
        return (code,)

    def on_cuModuleGetFunction(self, module, name):
        assert name.decode() in KERNELS[module.split()[0].decode()], "each kernel comes from its own source"
        return (name.decode(),)

    def on_cuLaunchKernel(self, function, *geometry_and_more):
        assert self.stack[-1] == CONTEXT, "a launch goes to torch's context"
        self.launched.append((function, *geometry_and_more))
        return ()


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(launch, "_devices", {})
    monkeypatch.setattr(launch, "_warned", False)
    monkeypatch.setattr(launch, "_driver", lambda: made)
    monkeypatch.setattr(launch, "_stream", lambda device: STREAM if device == DEVICE else 0)
    monkeypatch.setattr(launch, "_architecture", lambda index: f"sm_9{index}")
    monkeypatch.setattr(launch, "_capturing", lambda: False)
    monkeypatch.setattr(launch, "cubin", lambda name, architecture: f"{name} {architecture}".encode())
    return made


def test_a_device_is_loaded_once_with_all_its_kernels(driver):
    assert launch.available(DEVICE) and launch.available(DEVICE)
    assert driver.calls.count("cuModuleLoadData") == len(KERNELS)
    names = [name for names in KERNELS.values() for name in names]
    assert sorted(launch._devices[1].functions) == sorted(names)
    assert driver.calls.count("cuFuncLoad") == len(names), (
        "lazy loading would be put off to a launch, which may be captured"
    )
    assert driver.stack == [OTHER_CONTEXT], "the thread's context is as it was"


def test_threads_that_come_at_once_load_once(driver):
    start, found = threading.Barrier(8), []

    def come():
        start.wait()
        found.append(launch.available(DEVICE))

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8 and driver.calls.count("cuModuleLoadData") == len(KERNELS)


@pytest.mark.parametrize("current", [0, OTHER_CONTEXT, CONTEXT])
def test_a_launch_is_in_torchs_context_on_its_stream(driver, current):
    launch.available(DEVICE)
    driver.stack = [current]
    rows = torch.arange(6)
    launch.launch("fold_float32", 9, (32, 8), DEVICE, rows[2:], None, 2**40, 0)
    ((function, *geometry, shared, stream, parameters, extra),) = driver.launched
    assert (function, geometry, shared, stream, extra) == ("fold_float32", [9, 1, 1, 32, 8, 1], 0, STREAM, 0)
    assert parameters == (
        (rows.data_ptr() + 16, 0, 2**40, 0),
        (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    )
    assert driver.stack == [current]
    asked = [call for call in driver.calls if "Sync" in call or "Alloc" in call or "Memcpy" in call]
    assert not asked, "nothing waits, nothing is allocated"


def test_a_grid_is_not_larger_than_a_device_takes(driver):
    launch.available(DEVICE)
    launch.launch("fold_float32", 2**40, (256, 1), DEVICE)
    assert driver.launched[0][1] == launch.MAX_BLOCKS


def test_a_launch_that_fails_is_an_error_and_no_reason_for_plain_torch(driver):
    call = kernels.or_reference(
        lambda rows: launch.launch("fold_float32", 1, (1, 1), rows.device), lambda rows: "plain"
    )
    rows = SimpleNamespace(device=DEVICE)
    assert call(rows) is None
    driver.fails["cuLaunchKernel"] = Status.CUDA_ERROR_ASSERT
    with pytest.raises(KernelError, match="refuses fold_float32: CUDA_ERROR_ASSERT") as caught:
        call(rows)
    assert caught.value.code == "cuda_launch" and driver.stack == [OTHER_CONTEXT]
    del driver.fails["cuLaunchKernel"]
    assert call(rows) is None


def test_plain_torch_serves_where_kernels_cannot_be_had_and_says_so_once(driver):
    driver.fails["cuModuleLoadData"] = Status.CUDA_ERROR_INVALID_IMAGE
    call = kernels.or_reference(lambda rows, more: "kernel", lambda rows, more: f"plain {more}")
    with pytest.warns(RuntimeWarning, match=r"plain torch instead of its CUDA kernels: .*INVALID_IMAGE") as said:
        assert call(SimpleNamespace(device=DEVICE), 1) == "plain 1"
    assert len(said) == 1 and driver.stack == [OTHER_CONTEXT]
    loads = driver.calls.count("cuModuleLoadData")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(SimpleNamespace(device=DEVICE), 2) == "plain 2"
        driver.on_cuDevicePrimaryCtxRetain = lambda device: (CONTEXT,)
        assert call(SimpleNamespace(device=torch.device("cuda", 0)), 3) == "plain 3"
    assert driver.calls.count("cuModuleLoadData") == loads + 1, "each device is tried once"


def test_a_device_without_kernels_does_not_take_them_from_another(driver, monkeypatch):
    def cubin(name, architecture):
        if architecture == "sm_90":
            raise KernelError("an architecture that NVRTC does not know", code="cuda_unavailable")
        return f"{name} {architecture}".encode()

    monkeypatch.setattr(launch, "cubin", cubin)
    with pytest.warns(RuntimeWarning, match="does not know"):
        assert not launch.available(torch.device("cuda", 0))
    assert launch.available(DEVICE)


def test_the_reason_is_told_without_a_warning(driver):
    driver.fails["cuModuleGetFunction"] = Status.CUDA_ERROR_INVALID_IMAGE
    assert "refuses plan_rank_int32: CUDA_ERROR_INVALID_IMAGE" in launch.why_not(DEVICE)
    launch._devices.clear()
    driver.fails.clear()
    assert launch.why_not(DEVICE) is None


def test_nothing_is_loaded_while_a_graph_is_captured(driver, monkeypatch):
    call = kernels.or_reference(lambda rows: "kernel", lambda rows: "plain")
    rows = SimpleNamespace(device=DEVICE)
    monkeypatch.setattr(launch, "_capturing", lambda: True)
    with pytest.raises(KernelError, match=r"cuda:1.*run the op once before the capture") as caught:
        call(rows)
    assert caught.value.code == "cuda_capture" and not driver.calls
    monkeypatch.setattr(launch, "_capturing", lambda: False)
    assert call(rows) == "kernel"
    monkeypatch.setattr(launch, "_capturing", lambda: True)
    assert call(rows) == "kernel"


def test_an_old_driver_loads_without_cuFuncLoad(driver):
    def old(*arguments):
        raise RuntimeError("Function cuFuncLoad not found")

    driver.cuFuncLoad = old
    assert launch.available(DEVICE)


def test_no_driver_and_no_bindings_are_said_with_the_mend(driver, monkeypatch):
    def absent(*arguments):
        raise RuntimeError("libcuda is not on this system")

    driver.cuInit = absent
    with pytest.warns(RuntimeWarning, match=r"driver does not load.*libcuda.*pip install"):
        assert not launch.available(DEVICE)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(KernelError, match=r"bindings are not there.*pip install cuda-bindings"):
        launch._driver()


def test_the_bindings_take_a_launch_as_we_write_it():
    """Without a driver the real bindings come as far as the missing library: they took the arguments."""
    real = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings comes with torch's CUDA wheels on Linux")
    if torch.cuda.is_available():
        pytest.skip("with a driver tests/gpu launches for real")
    parameters = ((123, 0, 2**40), (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64))
    with pytest.raises(RuntimeError, match=r"(?i)cuda.*driver|libcuda"):
        real.cuLaunchKernel(0, 9, 1, 1, 32, 8, 1, 0, STREAM, parameters, 0)
    with pytest.raises(TypeError):
        real.cuLaunchKernel(0, 9, 1, 1, 32, 8, 1, 0, STREAM, ((123, "no number"), (ctypes.c_void_p, ctypes.c_int64)), 0)


def test_every_op_has_a_cuda_kernel():
    import moses.ops  # noqa: F401

    for op in (
        "dispatch_plan",
        "gather",
        "gather_backward",
        "combine",
        "combine_backward_y",
        "combine_backward_weights",
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"moses::{op}", "CUDA"), op
