"""`moses upcycle`: what it writes and says, and one line for bad input before anything is written."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf

import moses


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # the shared expert of width 0
@pytest.mark.parametrize("words", [[], ["--dtype", "float32"]])
def test_a_class_of_transformers(cli, tiny_folder, tmp_path, words):
    out = tmp_path / "moe"
    code, said, progress = cli(
        "upcycle", tiny_folder, "--experts", 4, "--every", 2, "--top-k", 2, "--router", "topk", *words, "--out", out
    )
    assert code == 0, progress
    if not words:  # on disk, from its bytes
        assert "made" in said and progress == ""
    else:
        assert "qwen2_moe, which transformers loads" in said and "blocks         1" in said
        assert [line.split()[0] for line in progress.splitlines()] == ["loading", "making", "writing"]
    moe, dense = (hf.AutoModelForCausalLM.from_pretrained(path) for path in (out, tiny_folder))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits for model in (dense, moe))
    assert (before - after).abs().max() < 1e-5 * before.abs().max()
    assert moe.config.pad_token_id == dense.config.pad_token_id
    for name in ("tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_folder / name).read_bytes()


def test_moses_own_folder_as_json(cli, tiny_folder, tmp_path):
    out = tmp_path / "moe"
    code, said, _ = cli(
        "upcycle", tiny_folder, "--layers", "0,1", "--keep-dense", "--noise", 0.1, "--seed", 3, "--json", "--out", out
    )
    document = json.loads(said)
    assert code == 0 and document["model_type"] == "moses" and document["blocks"] == [0, 1]
    assert document["difference"] == 0.0 and "beside" in document["why_moses"]
    assert document["parameters"] > document["parameters_before"]
    code, said, _ = cli("inspect", out)
    assert code == 0 and "moses's mixture  model.layers.1.mlp" in said and "llama" in said
    code, said, _ = cli("inspect", out, "--json")
    assert json.loads(said)["architectures"] == ["LlamaForCausalLM"] and len(json.loads(said)["layout"]) == 2
    description = json.loads((out / "moses_model.json").read_text())
    (out / "moses_model.json").write_text(json.dumps(description | {"layout": [3]}))
    code, said, errors = cli("inspect", out)
    assert (code, said) == (2, "") and "no config and layout" in errors
    (out / "moses_model.json").write_text(json.dumps(description))
    assert type(moses.load(out).model.layers[0].mlp).__name__ == "MixtureFFN"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--experts", "0"], "num_experts is 0"),
        (["--experts", "2", "--top-k", "3"], "top_k is 3 and there are 2"),
        (["--every", "2", "--layers", "1"], "every or layers"),
        (["--layers", "0,x"], "write --layers 0,2,4"),
        (["--layers", "7"], "names block 7"),
        (["--every", "5"], "no block would be a mixture"),
        (["--router", "switch", "--top-k", "1"], "keep_dense"),
        (["--noise", "-1"], "noise is -1"),
        (["--reinit", "2"], "share from 0 to 1"),
        (["--router", "nonsense"], "--router"),
        (["--keep-dense", "--dry-run"], "surgery on disk"),
    ],
)
def test_bad_settings_write_nothing(cli, tiny_folder, tmp_path, words, says):
    code, said, errors = cli("upcycle", tiny_folder, *words, "--out", tmp_path / "moe")
    assert (code, said) == (2, "") and says in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_upcycled_write_nothing(cli, tiny_folder, tiny_model, tmp_path):
    out = tmp_path / "moe"
    assert cli("upcycle", tiny_folder, "--out", out)[0] == 0
    before = sorted(file.name for file in out.iterdir())
    code, _, errors = cli("upcycle", tiny_folder, "--out", out)
    assert code == 2 and "is there already" in errors.splitlines()[-1]
    assert sorted(file.name for file in out.iterdir()) == before
    code, _, errors = cli("upcycle", tmp_path / "nowhere", "--out", tmp_path / "b")
    assert code == 2 and "no such folder" in errors.splitlines()[-1]
    mixture = tmp_path / "mixture"
    assert cli("upcycle", tiny_folder, "--every", 1, "--out", mixture)[0] == 0
    code, _, errors = cli("upcycle", mixture, "--out", tmp_path / "c")
    assert code == 2 and "has no dense FFN left" in errors.splitlines()[-1]
    bert = tmp_path / "bert"
    tiny_model("bert").save_pretrained(bert)
    hf.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(bert)
    code, _, errors = cli("upcycle", bert, "--out", tmp_path / "d")
    assert code == 2 and "has no FFN that is a module" in errors.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"moe", "mixture", "bert"}
