"""Run folders made by hand: save, load, forget, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

import moses
from moses import _core, checkpoint


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits.clone()


def train(model, name, batch, similar_to=None):
    model.begin_task(name, num_labels=2 if model._head is not None else None, similar_to=similar_to)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.end_task(name)
    model.eval()


@pytest.fixture
def trained(tiny_model, tiny_batch):
    def make(family="llama", **settings):
        model = moses.attach(tiny_model(family), moses.MosesConfig(density=0.2, **settings))
        for seed, name in enumerate("abc"):
            train(model, name, tiny_batch(family, seed=seed), "a" if name == "b" else None)
        return model

    return make


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
@pytest.mark.parametrize(
    "bank", [{}, {"granularity": "element"}, {"ffn_experts": "adapter"}], ids=["rank", "element", "adapter"]
)
def test_a_loaded_run_answers_with_the_same_bits(family, bank, trained, tiny_model, tiny_batch, tmp_path):
    model, batch = trained(family, **bank), tiny_batch(family)
    model.save(tmp_path / "run")
    twin = moses.load(tmp_path / "run", tiny_model(family))
    for name in "abc":
        with model.task(name), twin.task(name):
            assert torch.equal(logits(twin, batch), logits(model, batch))
    assert twin.registry == model.registry
    train(twin, "d", batch)
    twin.save(tmp_path / "run")
    again = moses.load(tmp_path / "run", tiny_model(family))
    with model.task("b"), again.task("b"):
        assert torch.equal(logits(again, batch), logits(model, batch))


def test_a_bank_that_grew_loads(tiny_model, tiny_batch, tmp_path):
    model = moses.attach(
        tiny_model("llama"), moses.MosesConfig(num_experts=2, rank=2, density=1.0, growth=1.0, reuse="none")
    )
    batch = tiny_batch("llama")
    for name in "abc":
        train(model, name, batch)
    model.save(tmp_path / "run")
    twin = moses.load(tmp_path / "run", tiny_model("llama"))
    assert all(len(layer.expert_ids) > 2 for layer in twin.registry.layers())
    for name in "abc":
        with model.task(name), twin.task(name):
            assert torch.equal(logits(twin, batch), logits(model, batch))


def folder_bytes(path):
    with _core.Store.open(path) as store:
        return sum(file.bytes for file in store.files().values())


def test_forgetting_in_a_folder_is_forgetting_in_memory(trained, tiny_model, tiny_batch, tmp_path):
    model, batch, run = trained(), tiny_batch("llama"), tmp_path / "run"
    model.save(run)
    before = folder_bytes(run)
    # b goes on with a part of what a brought; c has its own.
    shared, own = model.registry.overlap()[0][1], model.registry.new_bytes(0)
    assert shared > 0
    assert checkpoint.forget_task(run, "a")["bytes_freed"] == model.forget_task("a") == own - shared > 0
    middle = folder_bytes(run)
    freed = checkpoint.forget_task(run, "c")["bytes_freed"]
    assert freed == model.forget_task("c") > 0
    assert middle - folder_bytes(run) >= freed and before > middle
    twin = moses.load(run, tiny_model("llama"))
    assert [info.name for info in twin.registry.tasks()] == ["b"]
    with model.task("b"), twin.task("b"):
        assert torch.equal(logits(twin, batch), logits(model, batch))
    info = twin.registry.task("b")
    with _core.Store.open(run) as store:
        values = (
            checkpoint.read_tensors(store, checkpoint.adapter_file(info))["weights"].view(torch.uint8).numpy().tobytes()
        )
    assert twin.registry.content_hash(info.id, {info.id: values}) == info.content_hash
    with pytest.raises(moses.MosesError, match="a"):
        checkpoint.forget_task(run, "a")


def test_another_base_model_is_refused(trained, tiny_model, tmp_path):
    trained().save(tmp_path / "run")
    with pytest.raises(moses.MosesError, match="another base model") as caught:
        moses.load(tmp_path / "run", tiny_model("llama", seed=1))
    assert caught.value.code == "fingerprint_differs"
    with pytest.raises(moses.MosesError, match="in memory"):
        moses.load(tmp_path / "run")


def test_a_damaged_config_or_adapter_is_a_typed_error(trained, tiny_model, tmp_path):
    trained().save(tmp_path / "run")
    with _core.Store.open(tmp_path / "run", write=True) as store:
        config = json.loads(store.read("config.json"))
        name = next(file for file in store.files() if file.endswith("adapter.safetensors"))
        adapter = store.read(name)
        for damaged in (
            b"{",
            json.dumps({**config, "format_version": 99}).encode(),
            json.dumps({**config, "extra": 1}).encode(),
            b"[" * 10_000,
        ):
            store.commit({"config.json": damaged})
            with pytest.raises(moses.MosesError, match=r"config\.json"):
                moses.load(tmp_path / "run", tiny_model("llama"))
        store.commit({"config.json": json.dumps(config).encode(), name: adapter[:-4]})
    with pytest.raises(moses.MosesError, match="adapter"):
        moses.load(tmp_path / "run", tiny_model("llama"))


def test_weights_that_do_not_fit_the_masks_are_refused(trained, tiny_model, tmp_path):
    from safetensors.torch import save

    trained().save(tmp_path / "run")
    with _core.Store.open(tmp_path / "run", write=True) as store:
        name = next(file for file in store.files() if file.endswith("adapter.safetensors"))
        tensors = checkpoint.read_tensors(store, name)
        store.commit({name: save({**tensors, "weights": tensors["weights"][:-1]})})
    with pytest.raises(moses.MosesError, match="weights of task"):
        moses.load(tmp_path / "run", tiny_model("llama"))
