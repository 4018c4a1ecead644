"""Folders of models: whole or not there, readable for good (a golden folder), and typed errors for damaged and hostile ones."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
import transformers as hf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import moses
from moses import routers
from moses.errors import FormatError, ModelError, MosesError, StoreError
from moses.growth import MixtureFFN, load_folder, moe_blocks, route, save_model
from moses.growth import folder as folders
from moses.growth.extract import extract
from moses.growth.layout import ROUTERS, describe
from moses.growth.upcycle import upcycle
from moses.models import load_model

GOLDEN = Path(__file__).parents[1] / "golden" / "model-v1"
IDS = torch.arange(11)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad(), route():
        return model(input_ids=IDS).logits


def small() -> hf.PreTrainedModel:
    """One block dense, one with experts beside its FFN, one of experts, one that an extraction left dense; weights by a formula."""
    config = hf.LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    model = upcycle(hf.LlamaForCausalLM(config).eval(), 3, layers=[2], router="noisy_topk")
    beside = upcycle(hf.LlamaForCausalLM(config).eval(), 2, layers=[1], keep_dense=True)
    model.model.layers[1].mlp = beside.model.layers[1].mlp
    mixtral = hf.MixtralForCausalLM(
        hf.MixtralConfig(**{**config.to_dict(), "architectures": None, "model_type": "mixtral"}, num_local_experts=2)
    )
    model.model.layers[3].mlp = extract(mixtral, {3: [1]}).model.layers[3].mlp
    with torch.no_grad():
        for place, tensor in enumerate(model.parameters()):
            tensor.copy_((torch.arange(tensor.numel()) * 0.7 + place).sin().view(tensor.shape))
    return model


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return save_model(small(), tmp_path_factory.mktemp("small") / "model")


@pytest.fixture
def copied(written, tmp_path) -> Path:
    """A folder of its own for a test that damages it."""
    return Path(shutil.copytree(written, tmp_path / "copy"))


def changed(folder: Path, change) -> Path:
    file = folder / folders.DESCRIPTION
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return folder


def code_of(folder: Path) -> str:
    with pytest.raises(FormatError) as error:
        load_folder(folder)
    assert "\n" not in str(error.value)
    return error.value.code


def test_the_golden_folder_stays_readable_and_is_what_is_written(tmp_path):
    if os.environ.get("MOSES_UPDATE_GOLDEN"):
        shutil.rmtree(GOLDEN, ignore_errors=True)
        save_model(small(), GOLDEN)
        save_file({"logits": logits(small())}, GOLDEN / "expected.safetensors")
    model = load_folder(GOLDEN)
    expected = load_file(GOLDEN / "expected.safetensors")["logits"]
    assert (logits(model) - expected).abs().max() < 1e-5
    again = save_model(model, tmp_path / "again")
    mine, golden = (json.loads((path / folders.DESCRIPTION).read_text()) for path in (again, GOLDEN))
    for document in (mine, golden):  # what a version of transformers adds to its configs is its own
        document["config"] = {name: document["config"][name] for name in golden["config"] if name in mine["config"]}
        document["config"].pop("transformers_version", None)
    assert mine == golden
    assert (again / folders.WEIGHTS).read_bytes() == (GOLDEN / folders.WEIGHTS).read_bytes()


def test_a_folder_holds_every_place(written):
    model = load_folder(written)
    assert [place["kind"] for place in describe(model)] == ["mixture", "mixture", "dense"]
    assert torch.equal(logits(model), logits(small()))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not model.training and all(part.requires_grad for part in model.parameters())


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_is_written_with_its_settings(name, tiny_model, tmp_path):
    made = {
        "topk": lambda: routers.TopKRouter(
            32, 4, 2, scoring="sigmoid", normalise=False, scale=2.5, bias=True, num_groups=2, top_groups=1
        ),
        "noisy_topk": lambda: routers.NoisyTopKRouter(32, 4, 3, importance_weight=0.7),
        "gshard": lambda: routers.GShardRouter(32, 4, random_second=False, capacity_factor=1.5),
        "switch": lambda: routers.SwitchRouter(32, 4, jitter=0.1),
        "dense": lambda: routers.DenseRouter(32, 4),
        "expert_choice": lambda: routers.ExpertChoiceRouter(32, 4, 1.5),
        "random": lambda: routers.RandomRouter(97, 2, 2, seed=3),
    }[name]()
    model = tiny_model("gpt2")
    layer = MixtureFFN(
        32, 12, made, kind="up_down", activation="gelu_new", bias=True, dropout=0.1, block="transformer.h.1"
    )
    model.transformer.h[1].mlp = layer.eval()
    again = load_folder(save_model(model, tmp_path / name))
    router = again.transformer.h[1].mlp.router
    assert type(router) is type(made) and describe(again) == describe(model)
    assert {k: v for k, v in vars(router).items() if k[0] != "_"} == {
        k: v for k, v in vars(made).items() if k[0] != "_"
    }
    routing = {"token_ids": IDS, "domains": 1} if name == "random" else {}
    with torch.no_grad(), route(**routing) as mine:
        one = model(input_ids=IDS).logits
    with torch.no_grad(), route(**routing):
        assert torch.equal(one, again(input_ids=IDS).logits)
    assert list(mine) == ["transformer.h.1"] and mine["transformer.h.1"].load.sum() > 0


def test_a_loaded_table_knows_the_tokens_of_every_call(tiny_model, tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].mlp = MixtureFFN(
        32, 12, routers.RandomRouter(97, 2, 2, seed=3), block="model.layers.1"
    ).eval()
    again = load_folder(save_model(model, tmp_path / "table"))
    for domain in (0, 1):
        with torch.no_grad(), route(token_ids=IDS, domains=domain):
            expected = model(input_ids=IDS).logits
        with torch.no_grad(), route(domains=domain):
            assert torch.equal(again(input_ids=IDS).logits, expected)
    with torch.no_grad():  # domain 0 where none is named
        assert not torch.equal(again(input_ids=IDS).logits, expected)
        assert torch.equal(again(IDS).logits, again(input_ids=IDS).logits)
    mask = torch.ones_like(IDS)
    grown = again.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None)
    with torch.no_grad():  # cached steps route the new token alone
        assert torch.equal(grown[0, -1], again(input_ids=grown[:, :-1]).logits[0, -1].argmax())


def test_half_precision_keeps_its_bits(tmp_path, tiny_model):
    model = upcycle(tiny_model("gemma").to(torch.bfloat16), 3, every=1)
    again = load_folder(save_model(model, tmp_path / "half"))
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert again.model.layers[0].mlp.router.weight.dtype == torch.float32


def test_files_are_for_a_group_to_read_and_the_folder_appears_whole(written, tmp_path, monkeypatch):
    for file in [written, *written.iterdir()]:
        assert file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH), file
    assert not (written / "config.json").exists()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_model(small(), tmp_path / "never")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_over(written, tmp_path):
    before = {file.name: file.stat().st_mtime_ns for file in written.iterdir()}
    for path, code in ((written, "folder_exists"), (tmp_path / "no" / "folder", "no_parent_folder")):
        with pytest.raises(StoreError) as error:
            save_model(small(), path)
        assert error.value.code == code
    assert before == {file.name: file.stat().st_mtime_ns for file in written.iterdir()}
    (tmp_path / "empty").mkdir()
    assert load_folder(save_model(small(), tmp_path / "empty")) is not None


def test_what_a_folder_cannot_hold(tmp_path):
    model = small()
    model.model.layers[2].mlp.router = torch.nn.Sequential(model.model.layers[2].mlp.router)
    model.model.layers[2].mlp.router.top_k = model.model.layers[2].mlp.router.num_experts = 3
    with pytest.raises(MosesError):
        save_model(model, tmp_path / "router")
    model = small()
    model.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(FormatError, match=r"cannot hold model\.layers\.0\.mlp\.extra") as error:
        save_model(model, tmp_path / "extra")
    assert error.value.code == "cannot_hold" and list(tmp_path.iterdir()) == []


def test_classes_are_written_as_transformers_does_and_name_the_number_twice(tmp_path, tiny_mixture):
    model = tiny_mixture("qwen3_moe")
    path = save_model(model, tmp_path / "qwen3")
    config = json.loads((path / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 8
    again = hf.AutoModelForCausalLM.from_pretrained(path)
    assert torch.equal(logits(again), logits(model)) and moe_blocks(again)[0].num_experts == 8
    assert (path / "config.json").stat().st_mode & 0o777 == 0o644


def test_load_and_load_model_know_the_folder(written, tmp_path, tiny_folder):
    assert torch.equal(logits(moses.load(written)), logits(small()))
    with pytest.raises(ModelError) as error:
        load_model(written)
    assert error.value.code == "model_unreadable"
    dense, tokenizer, _ = load_model(tiny_folder)
    path = save_model(upcycle(dense, 3, keep_dense=True), tmp_path / "whole", tokenizer)
    model, again, kind = load_model(path, "bfloat16")
    assert kind == "causal" and model.dtype == torch.bfloat16
    assert again("the news").input_ids == tokenizer("the news").input_ids
    assert model.generation_config.eos_token_id == dense.generation_config.eos_token_id


DAMAGE = {
    "version": (lambda d: d.update(format_version=2), "unknown_version"),
    "format": (lambda d: d.update(format="zip"), "not_moses_model"),
    "no config": (lambda d: d.pop("config"), "damaged_layout"),
    "dtype": (lambda d: d.update(dtype="int4"), "damaged_layout"),
    "a class that is none": (lambda d: d.update(architecture="pipeline"), "damaged_layout"),
    "another class": (lambda d: d.update(architecture="BertModel"), "damaged_layout"),
    "unknown model type": (lambda d: d["config"].update(model_type="../../etc"), "damaged_layout"),
    "million blocks": (lambda d: d["config"].update(num_hidden_layers=10**6), "damaged_layout"),
    "wide": (lambda d: d["config"].update(hidden_size=10**9), "damaged_layout"),
    "negative": (lambda d: d["config"].update(intermediate_size=-5), "damaged_layout"),
    "wider experts": (lambda d: d["layout"][1].update(d_ff=7), "damaged_tensors"),
    "huge experts": (lambda d: d["layout"][1].update(d_ff=2**60), "damaged_layout"),
    "more experts": (lambda d: d["layout"][1]["router"]["settings"].update(num_experts=4), "damaged_tensors"),
    "no such router": (lambda d: d["layout"][1]["router"].update(name="eval"), "damaged_layout"),
    "router's settings": (lambda d: d["layout"][1]["router"].update(settings={"x": 1}), "damaged_layout"),
    "no such kind": (lambda d: d["layout"][1].update(kind="exec"), "damaged_layout"),
    "no such place": (lambda d: d["layout"][1].update(path="model.layers.9.mlp"), "damaged_layout"),
    "no place": (lambda d: d["layout"][1].pop("path"), "damaged_layout"),
    "a place is a list": (lambda d: d["layout"].append([1]), "damaged_layout"),
    "layout forgotten": (lambda d: d.update(layout=[]), "damaged_tensors"),
    "no such activation": (lambda d: d["layout"][1].update(activation="os.system"), "damaged_layout"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_descriptions(copied, name):
    change, code = DAMAGE[name]
    found = code_of(changed(copied, change))
    assert found == code or (name == "wide" and found == "damaged_tensors")


def test_damaged_files(copied, tmp_path):
    weights, description = copied / folders.WEIGHTS, copied / folders.DESCRIPTION
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(FormatError):
        load_folder(copied)
    weights.unlink()
    with pytest.raises(FileNotFoundError):
        load_folder(copied)
    tensors = load_file_bytes(whole)
    odd = {**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.int64)}
    save_file(odd, weights)
    assert code_of(copied) == "damaged_tensors"
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, weights)
    assert code_of(copied) == "damaged_tensors"
    weights.write_bytes(whole)
    for text, code in ((b"{", "json_damaged"), (b"[" * 100_000, "json_damaged"), (b"[]", "not_moses_model")):
        description.write_bytes(text)
        assert code_of(copied) == code
    with description.open("wb") as file:
        file.truncate(folders.MAX_DESCRIPTION_BYTES + 1)
    assert code_of(copied) == "json_too_large"
    assert code_of(tmp_path) == "not_moses_model"


def load_file_bytes(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(data)


def test_a_table_that_names_an_expert_that_is_not_there(tmp_path, tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].mlp = MixtureFFN(32, 8, routers.RandomRouter(97, 2, 2), block="model.layers.0")
    model.model.layers[0].mlp.router.table[1, 5] = 4
    assert code_of(save_model(model, tmp_path / "table")) == "damaged_tensors"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_change_of_a_description_is_a_typed_error_or_the_same_model(written, tmp_path_factory, data):
    document = json.loads((written / folders.DESCRIPTION).read_text())
    spot = document
    while isinstance(spot, (dict, list)) and spot:
        keys = sorted(spot) if isinstance(spot, dict) else range(len(spot))
        key = data.draw(st.sampled_from(list(keys)))
        if not isinstance(spot[key], (dict, list)) or not spot[key] or data.draw(st.booleans()):
            break
        spot = spot[key]
    spot[key] = data.draw(st.sampled_from([None, -1, 0, 10**12, 1.5, "", "x" * 50, [], {}, True]))
    target = tmp_path_factory.mktemp("changed")
    (target / folders.DESCRIPTION).write_text(json.dumps(document))
    os.link(written / folders.WEIGHTS, target / folders.WEIGHTS)
    try:
        model = load_folder(target)
    except MosesError:
        return
    assert set(model.state_dict()) == set(small().state_dict())
