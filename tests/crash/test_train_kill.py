"""`moses train` killed outright at odd moments goes on with --resume and ends in the same results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

SETTINGS = ("epochs=2", "batch_size=4", "max_length=96", "max_new_tokens=3", "eval_limit=3", "learning_rate=0.02")


def command(folder, out):
    train = [sys.executable, "-m", "moses", "train", "--model", str(folder), "--stream", "tiny", "--method", "moses"]
    return [*train, "--out", str(out), "--resume", *(part for setting in SETTINGS for part in ("--set", setting))]


def measured(out):
    results = json.loads((out / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in ("environment", "seconds")}


@pytest.mark.skipif("MOSES_PROVE" not in os.environ, reason="starts torch a dozen times; part of `make prove`")
@pytest.mark.timeout(1800)
def test_a_killed_run_ends_in_the_same_results(tiny_folder, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    start = time.monotonic()
    subprocess.run(command(tiny_folder, whole), check=True)
    seconds = time.monotonic() - start
    for share in (0.5, 0.65, 0.8, 0.9):
        process = subprocess.Popen(command(tiny_folder, part))
        try:
            process.wait(share * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    subprocess.run(command(tiny_folder, part), check=True)
    assert measured(part) == measured(whole)
    verify = [sys.executable, "-m", "moses", "verify", str(part), "--against", str(whole)]
    subprocess.run(verify, check=True)
