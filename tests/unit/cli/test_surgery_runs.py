"""`moses grow`, `prune` and `extract` of a run: the same commands as of a checkpoint, with the options that a run has."""

from __future__ import annotations

import json

import pytest
import torch
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
        (["prune", "MODEL", "--calibrate", "tiny", "--out", "X"], "--to belongs to"),
        (["prune", "MODEL", "--calibrate", "tiny", "--to", "1", "--out", "X"], "experts"),
        (["prune", "MODEL", "--keep", "0", "--by", "norm", "--out", "X"], "--by is not for a checkpoint"),
        (["grow", "MODEL", "--add", "1", "--layers", "0", "--out", "X"], "--layers is not for a checkpoint"),
    ],
)
def test_what_does_not_fit_writes_nothing(cli, trained, tiny_folder, tmp_path, words, says):
    places = {"RUN": trained / "lifelong-moe", "MODEL": tiny_folder, "X": tmp_path / "x"}
    code, said, errors = cli(*[places.get(word, word) for word in words])
    assert (code, said) == (2, "") and says in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # the shared expert of width 0
@pytest.mark.parametrize("by", ["use", "norm"])
def test_a_checkpoint_is_pruned_by_its_use_on_a_stream(cli, tiny_folder, tmp_path, by):
    """The gate of a mixture is moved so that expert 2 has every token: it is what stays."""
    moe = tmp_path / "moe"
    assert cli("upcycle", tiny_folder, "--experts", 4, "--every", 1, "--top-k", 1, "--out", moe)[0] == 0
    model = hf.AutoModelForCausalLM.from_pretrained(moe)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.gate.weight.data[2] = 1.0
        layer.post_attention_layernorm.weight.data.abs_()
    with torch.no_grad():  # features of one sign, so that a row of ones wins
        model.model.embed_tokens.weight.abs_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.zero_()
            layer.mlp.experts.down_proj[:, 0] = 1e-3
    model.save_pretrained(moe)
    words = ["--calibrate", "tiny", "--to", 1, "--by", by, "--top-k", 1]
    code, said, errors = cli("prune", moe, *words, "--out", tmp_path / "small", "--json")
    assert code == 0, errors
    plan = json.loads((tmp_path / "small" / "moses_surgery.json").read_text())["plan"]
    assert [[slot["sources"] for slot in layer["slots"]] for layer in plan["layers"]] == [[[2]], [[2]]], said
