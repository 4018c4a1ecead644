"""A real small encoder learns real tasks one after the other: well above chance, and with nothing forgotten."""

from __future__ import annotations

from moses import training
from moses.progress import Progress
from moses.stream import load_stream


def test_minilm_learns_two_tasks_and_forgets_nothing(tmp_path):
    stream = load_stream("demo", ["topic", "action"], num_train=96, num_test=36)
    settings = {"epochs": 5, "batch_size": 8, "learning_rate": 4e-3, "max_length": 64}
    run = training.train(
        "minilm", stream=stream, output_dir=tmp_path / "run", settings=settings, progress=Progress(quiet=True)
    )
    (topic, missing), (kept, action) = run.matrix
    assert missing is None and kept == topic
    assert topic > 40 and action > 40, "chance is 12.5 and 16.7"
    assert run.results["tail"]["task_accuracy"] == 100.0
