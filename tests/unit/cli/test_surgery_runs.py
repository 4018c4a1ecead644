"""`moses grow`, `prune` and `extract` of a run: the same commands as of a checkpoint, with the options that a run has."""

from __future__ import annotations

import json

import pytest
import transformers as hf

import moses

SETTINGS = ("epochs=1", "batch_size=8", "learning_rate=0.01", "eval_limit=1", "max_new_tokens=1", "eval_rows=final")


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """Runs of both growing methods on two tasks."""
    from moses.cli import main

    folder = tmp_path_factory.mktemp("grown")
    for method, more in (("lifelong-moe", ()), ("pangu-sigma", ("experts_per_group=1",))):
        words = ["train", "--model", tiny_folder, "--stream", "tiny", "--tasks", "living,things", "--method", method]
        settings = [word for pair in (*SETTINGS, *more) for word in ("--set", pair)]
        assert main([*map(str, words), *settings, "--out", str(folder / method)]) == 0
    return folder


def test_a_run_is_grown_pruned_and_read(cli, trained, tmp_path):
    run = trained / "lifelong-moe"
    code, said, errors = cli("grow", run, "--add", 2, "--from", "fresh", "--out", tmp_path / "grown", "--json")
    assert code == 0, errors
    grown = json.loads(said)
    assert all(grown["experts_after"][layer] == count + 2 for layer, count in grown["experts_before"].items())
    code, said, errors = cli("prune", tmp_path / "grown", "--to", 2, "--dry-run")
    assert code == 0, errors
    assert "nothing was written" in said and "score by task" in said
    code, said, errors = cli("prune", tmp_path / "grown", "--to", 2, "--out", tmp_path / "pruned", "--json")
    assert code == 0, errors
    assert set(json.loads(said)["experts_after"].values()) == {2}
    moses.load(tmp_path / "pruned")


def test_a_domains_model_is_plain_transformers(cli, trained, tmp_path):
    code, said, errors = cli("extract", trained / "pangu-sigma", "--domain", "living", "--out", tmp_path / "sub")
    assert code == 0, errors
    assert "llama, which transformers loads" in said
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sub").config.model_type == "llama"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["grow", "RUN", "--add", "2"], "give --out"),
        (["grow", "RUN", "--add", "2", "--from", "0,1", "--out", "X"], "most-used, fresh"),
        (["grow", "RUN", "--add", "2", "--in-place"], "--in-place is not for a run"),
        (["grow", "RUN", "--add", "2", "--layers", "7", "--out", "X"], "7"),
        (["prune", "RUN", "--keep", "0", "--out", "X"], "--keep is not for a run"),
        (["prune", "RUN", "--out", "X"], "give one of keep_usage"),
        (["prune", "RUN", "--budget", "many", "--out", "X"], "is no size"),
        (["prune", "RUN", "--experts", "0,1,2,3,4,5,6,7", "--out", "X"], "expert"),
        (["extract", "RUN", "--out", "X"], "give --domain"),
        (["extract", "RUN", "--domain", "nobody", "--out", "X"], "nobody"),
        (["extract", "RUN", "--experts", "0", "--out", "X"], "--experts is not for a run"),
        (["extract", "MODEL", "--domain", "de", "--out", "X"], "--domain is not for a checkpoint"),
        (["prune", "MODEL", "--calibrate", "tiny", "--out", "X"], "--calibrate is not for a checkpoint"),
        (["grow", "MODEL", "--add", "1", "--layers", "0", "--out", "X"], "--layers is not for a checkpoint"),
    ],
)
def test_what_does_not_fit_writes_nothing(cli, trained, tiny_folder, tmp_path, words, says):
    places = {"RUN": trained / "lifelong-moe", "MODEL": tiny_folder, "X": tmp_path / "x"}
    code, said, errors = cli(*[places.get(word, word) for word in words])
    assert (code, said) == (2, "") and says in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
