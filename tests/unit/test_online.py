"""Streams without task boundaries: a pass over the tiny stream opens a task a domain and knows the one that comes back."""

from __future__ import annotations

import json

import pytest

from moses import training
from moses.progress import Progress

SETTINGS = {
    "batch_size": 4,
    "learning_rate": 0.02,
    "max_length": 96,
    "max_new_tokens": 3,
    "eval_limit": 2,
    "identifier.num_features": 32,
    "drift.num_features": 32,
    "drift.reference": 8,
    "drift.opening": 4,
    "horizon": 16,
}


def run(folder, out, method="moses", tasks=("living", "action", "living"), **more):
    settings = SETTINGS | more.pop("settings", {})
    return training.train(
        str(folder),
        stream="tiny",
        tasks=tasks,
        method=method,
        output_dir=out,
        settings=settings,
        progress=Progress(quiet=True),
        boundaries="none",
        **more,
    )


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("online") / "run"
    return out, run(tiny_folder, out).results


def test_segments(finished):
    out, results = finished
    print(json.dumps(results["online"], indent=1))
    print(results["til"], results["tail"])
