"""What only a GPU can run is at least importable, collected and skipped with a reason where there is none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="make test-gpu and make bench-gpu run them for real")


def test_the_tests_for_a_gpu_are_collected_and_skipped_with_a_reason():
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "needs a CUDA device" in done.stdout and "passed" not in done.stdout and "failed" not in done.stdout


@pytest.fixture
def bench():
    specification = importlib.util.spec_from_file_location("gpu_bench", ROOT / "benches" / "gpu.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_bench_says_that_it_needs_a_gpu(bench, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as left:
        bench.main()
    assert left.value.code == 2 and "needs a CUDA device" in capsys.readouterr().err


def test_the_systems_of_the_bench_make_the_same_plan(bench):
    ids = torch.randint(5, (40, 2), generator=torch.Generator().manual_seed(0))
    found = {name: call() for name, call in bench.plan_calls(ids, 5).items() if name != "sort"}
    ours, (order, inverse, ends) = found["moses"], found["torch"]
    assert torch.equal(ours.order.long(), order) and torch.equal(ours.inverse.long(), inverse)
    assert torch.equal(ours.offsets[1:], ends)
