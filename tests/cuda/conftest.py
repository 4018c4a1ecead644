"""Kernels on the host: compiled once a session, in place of launches on a device."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest


def _host():
    # tests are no package: pytest imports them by path
    if "moses_tests_host" not in sys.modules:
        specification = importlib.util.spec_from_file_location("moses_tests_host", Path(__file__).with_name("host.py"))
        sys.modules["moses_tests_host"] = module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    return sys.modules["moses_tests_host"]


@pytest.fixture(scope="session")
def host_module():
    return _host()


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    host = _host()
    if host.COMPILER is None:
        pytest.skip("a C++ compiler runs the CUDA kernels on the host, and there is none: install g++")
    return host.compile_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def on_host(host_kernels, monkeypatch):
    """Call it with a grid, or None: from then on the ops' kernels run on the host. Memory that is not written to is NaN."""
    import torch

    from moses.cuda import kernels

    def use(grid=None):
        runner = _host().Host(host_kernels, grid)
        monkeypatch.setattr(kernels, "launch", runner)
        return runner

    torch.use_deterministic_algorithms(True)
    yield use
    torch.use_deterministic_algorithms(False)
