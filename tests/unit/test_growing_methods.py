"""Lifelong-MoE and PanGu-Σ: what was learned keeps its bits, the old model is the same weights, and a run folder is enough."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import pytest
import torch
import transformers as hf

import moses
from moses import checkpoint, training
from moses.errors import ConfigError, FormatError, ModelError, RegistryError, RunError, StoreError, SurgeryError
from moses.growth.folder import load_folder, save_model
from moses.growth.growing import GrowingLayer
from moses.growth.layer import route
from moses.growth.upcycle import upcycle
from moses.inspect import inspect_path
from moses.methods import method_class
from moses.models import load_model
from moses.progress import Progress
from moses.run_extract import extract_run
from moses.run_surgery import grow_run, prune_run
from moses.stream import load_stream
from moses.verify import verify_path

METHODS = ("lifelong-moe", "pangu-sigma")
SETTINGS = {
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 0.01,
    "weight_decay": 0.1,
    "eval_limit": 2,
    "max_new_tokens": 2,
}
QUICK = {"epochs": 1, "eval_modes": ["til"], "eval_rows": "final"}


def small_stream():
    """A few examples of three tasks."""
    stream = load_stream("tiny")
    tasks = tuple(dataclasses.replace(task, train=task.train[:8], test=task.test[:2]) for task in stream.tasks)
    return dataclasses.replace(stream, tasks=tasks)


def train(folder, out, name, **more):
    stream = small_stream()
    settings = SETTINGS | more.pop("settings", {})
    return training.train(
        str(folder), None, stream, name, out, settings=settings, progress=Progress(quiet=True), **more
    )


@pytest.fixture(scope="module", params=METHODS)
def finished(request, tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    return request.param, out, train(tiny_folder, out, request.param)


def batch(seed=1, rows=3, tokens=9):
    return torch.randint(3, 61, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def make(name, model, **settings):
    cls = method_class(name)
    config = cls.config_class(**settings)
    cls.check_model(model, config)
    return cls(model, config)


def learn(method, name, seed, steps=4, similar_to=None):
    ids = batch(seed)
    rows = [{"input_ids": row, "labels": row} for row in ids.tolist()]
    method.see_task(rows)
    method.begin_task(name, name, None, similar_to)
    model = method.model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        with method.watch() as seen:
            output = model(input_ids=ids, labels=ids)
        extra = method.extra_loss(model, {"input_ids": ids, "labels": ids}, output, seen)
        (output.loss if extra is None else output.loss + extra).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    method.end_task(name)
    model.eval()
    return losses


@torch.no_grad()
def logits(method, name, ids=None):
    with method.answer(name):
        return method.model(input_ids=batch(9) if ids is None else ids).logits


def mixtral():
    torch.manual_seed(0)
    return hf.MixtralForCausalLM(
        hf.MixtralConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            pad_token_id=0,
        )
    ).eval()


def qwen2_moe():
    torch.manual_seed(0)
    return hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            pad_token_id=0,
        )
    ).eval()


@pytest.mark.parametrize("name", METHODS)
def test_earlier_tasks_and_the_base_keep_every_bit(name, tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        plain = model(input_ids=batch(9)).logits
    method = make(name, model, **({"table": "balanced"} if name == "pangu-sigma" else {}))
    base = logits(method, None)
    torch.testing.assert_close(base, plain, rtol=0.0, atol=1e-5 * float(plain.abs().max()))
    after = {}
    for number, task in enumerate(("one", "two", "three", "four")):
        losses = learn(method, task, number)
        assert losses[-1] < losses[0]
        after[task] = logits(method, task)
        assert not torch.equal(after[task], base)
        for earlier, expected in after.items():
            assert torch.equal(logits(method, earlier), expected)
        assert torch.equal(logits(method, None), base)
    trainable = [key for key, p in model.named_parameters() if p.requires_grad]
    assert not trainable


def test_a_run_folder_is_enough_and_forgetting_frees_what_no_other_uses(finished, tmp_path):
    name, source, run = finished
    out = tmp_path / "run"
    shutil.copytree(source, out)
    assert run.metrics["bwt"] == 0.0 and run.metrics["forgetting"] == 0.0
    assert not verify_path(out).problems
    ids = batch(4) % 50
    tasks = run.results["tasks"]
    loaded = moses.load(out)
    trained = run.model.eval()
    for task in tasks:
        with torch.no_grad(), loaded.task(task), trained.task(task):
            assert torch.equal(loaded(input_ids=ids).logits, trained(input_ids=ids).logits)
    overlap = loaded.registry.overlap()
    if name == "pangu-sigma":
        assert all(overlap[i][j] == 0 for i in range(3) for j in range(3) if i != j)
    else:
        assert [overlap[i][2] for i in range(3)] == [overlap[i][i] for i in range(3)]
    document = inspect_path(out)
    assert json.dumps(document) and {task["name"] for task in document["tasks"]} == set(tasks)
    copied = tmp_path / "old"
    shutil.copytree(out, copied)
    gone = tasks[1] if name == "pangu-sigma" else tasks[2]
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    freed = checkpoint.forget_task(out, gone)["bytes_freed"]
    assert freed == run.results["overlap"][tasks.index(gone)][tasks.index(gone)] / (1 if name == "pangu-sigma" else 3)
    assert size - sum(file.stat().st_size for file in out.rglob("*.safetensors")) >= freed
    assert not verify_path(out, against=copied).problems
    again = moses.load(out)
    for task in set(tasks) - {gone}:
        with torch.no_grad(), again.task(task), trained.task(task):
            assert torch.equal(again(input_ids=ids).logits, trained(input_ids=ids).logits)
    with pytest.raises(RegistryError), again.task(gone):
        pass


def test_forgetting_an_early_task_moves_its_experts_to_who_uses_them(finished, tmp_path):
    name, source, run = finished
    if name != "lifelong-moe":
        return
    out = tmp_path / "run"
    shutil.copytree(source, out)
    ids = batch(4) % 50
    last = run.results["tasks"][-1]
    for gone in run.results["tasks"][:2]:
        assert checkpoint.forget_task(out, gone)["bytes_freed"] == 0
    loaded = moses.load(out)
    with torch.no_grad(), loaded.task(last), run.model.eval().task(last):
        assert torch.equal(loaded(input_ids=ids).logits, run.model(input_ids=ids).logits)


def answers(model, task):
    with torch.no_grad(), model.task(task):
        return model(input_ids=batch(4) % 50).logits


def test_a_run_grows_by_a_task_that_nobody_trained(finished, tmp_path):
    name, source, run = finished
    out = tmp_path / "grown"
    if name == "pangu-sigma":
        with pytest.raises(SurgeryError) as caught:
            grow_run(source, out)
        assert caught.value.code == "needs_training" and not out.exists()
        return
    done = grow_run(source, out, add=2, source="most-used")
    assert {count - done.experts_before[path] for path, count in done.experts_after.items()} == {2}
    assert done.bytes_after > done.bytes_before and not verify_path(out, against=source).problems
    grown, before = moses.load(out), moses.load(source)
    for task in run.results["tasks"]:
        assert torch.equal(answers(grown, task), answers(before, task))
    assert torch.isfinite(answers(grown, "grown-3")).all()
    forgotten = checkpoint.forget_task(out, "grown-3")
    assert forgotten["bytes_freed"] == 2 * (3 * 48 * 32 + 32) * 4
    for settings, code in (
        ({"source": 99}, "unknown_expert"),
        ({"add": 0}, "bad_plan"),
        ({"layers": [7]}, "unknown_layer"),
        ({"source": "best"}, "bad_plan"),
    ):
        with pytest.raises(SurgeryError) as caught:
            grow_run(source, tmp_path / "no", **settings)
        assert caught.value.code == code and not (tmp_path / "no").exists()


def test_a_run_is_pruned_with_a_report_and_ids_stay(finished, tmp_path):
    name, source, run = finished
    stream, out = small_stream(), tmp_path / "pruned"
    if name == "pangu-sigma":
        with pytest.raises(SurgeryError) as caught:
            prune_run(source, out, experts=[1], stream=stream)
        assert caught.value.code == "expert_in_use" and not out.exists()
        return
    dry = prune_run(source, to=4, stream=stream, dry_run=True)
    assert dry.path is None and set(dry.scores_before) == set(dry.scores_after) == set(run.results["tasks"])
    done = prune_run(source, out, to=4, stream=stream)
    assert set(done.experts_after.values()) == {4} and done.experts_after == dry.experts_after
    assert done.bytes_after < done.bytes_before and not verify_path(out).problems
    pruned, before = moses.load(out), moses.load(source)
    ids = {layer.name: layer.expert_ids for layer in before.registry.layers()}
    assert {layer.name: layer.expert_ids for layer in pruned.registry.layers()} == ids
    assert [task.id for task in pruned.registry.tasks()] == [task.id for task in before.registry.tasks()]
    use = before._answering.total_use("model.layers.1.mlp")
    kept = sorted(range(1, 7), key=lambda expert: (-int(use[expert]), expert))[:3]
    expected = before._answering.layers["model.layers.1.mlp"].into[[0, *sorted(kept)]]
    assert torch.equal(pruned._answering.layers["model.layers.1.mlp"].into, expected)
    whole = prune_run(source, tmp_path / "same", keep_usage=1.0, stream=stream, calibrate=stream, by="use")
    assert set(whole.experts_after.values()) <= {5, 6, 7}
    small = prune_run(source, budget=3 * (3 * 48 * 32 + 32) * 4, stream=stream, dry_run=True)
    assert set(small.experts_after.values()) == {4}
    for settings, code in (
        ({"to": 0}, "no_expert_left"),
        ({"experts": [0]}, "base_expert"),
        ({"experts": [9]}, "unknown_expert"),
        ({"budget": -1}, "budget_too_small"),
        ({"to": 4, "experts": [1]}, "bad_plan"),
        ({"to": 4, "by": "norm"}, "bad_plan"),
        ({"keep_usage": 0.0}, "bad_plan"),
    ):
        with pytest.raises(SurgeryError) as caught:
            prune_run(source, tmp_path / "no", stream=stream, **settings)
        assert caught.value.code == code and not (tmp_path / "no").exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # the shared expert of width 0
def test_a_domain_is_extracted_to_a_folder(finished, tmp_path):
    name, source, run = finished
    task, ids = run.results["tasks"][1], batch(4) % 50
    full = moses.load(source)
    expected = answers(full, task)
    done = extract_run(source, task, tmp_path / "sub")
    close = {"rtol": 0.0, "atol": 1e-5 * float(expected.abs().max())}
    if name == "pangu-sigma":
        assert done["model_type"] == "moses"
        found = load_folder(tmp_path / "sub")
        with torch.no_grad(), route(token_ids=ids, domains=0):
            assert torch.equal(found(input_ids=ids).logits, expected)
        merged = extract_run(source, task, tmp_path / "merged", merge_group=True, stream=small_stream())
        assert merged["model_type"] == "llama" and merged["perplexity_before"] != merged["perplexity_after"]
        dense = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.isfinite(dense(input_ids=ids).logits).all()
    else:
        found = load_model(str(tmp_path / "sub"))[0]
        with torch.no_grad():
            torch.testing.assert_close(found(input_ids=ids).logits, expected, **close)
    with pytest.raises(RunError) as caught:
        extract_run(source, "nowhere", tmp_path / "no")
    assert caught.value.code == "unknown_domain" and not (tmp_path / "no").exists()
    with pytest.raises(StoreError):
        extract_run(source, task, tmp_path / "sub")


@pytest.mark.parametrize("change", [{"keep_dense": True}, {"family": "gemma"}, {"top_k": 1, "keep_dense": True}])
def test_an_upcycled_folder_of_moses_is_grown_on(change, tiny_model, tiny_folder, tmp_path):
    """What no class of transformers holds is moses's own mixture, and a base model as good as any."""
    family, change = change.get("family", "llama"), {key: value for key, value in change.items() if key != "family"}
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_folder)
    made = upcycle(tiny_model(family, vocab_size=600, positions=128), 3, layers=[1], **change)
    base = save_model(made, tmp_path / "base", tokenizer)
    ids = batch(4)
    with torch.no_grad():
        before = load_folder(base)(input_ids=ids).logits
        attached = make("lifelong-moe", load_folder(base)).model(input_ids=ids).logits
    torch.testing.assert_close(attached, before, rtol=0.0, atol=1e-5 * float(before.abs().max()))
    run = train(base, tmp_path / "run", "lifelong-moe")
    assert run.metrics["bwt"] == 0.0
    task = run.results["tasks"][1]
    expected = answers(moses.load(tmp_path / "run"), task)
    extract_run(tmp_path / "run", task, tmp_path / "sub")
    with torch.no_grad():
        found = load_folder(tmp_path / "sub")(input_ids=ids % 50).logits
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


def test_an_upcycled_folder_with_another_router_is_not_grown_on(tiny_model):
    made = upcycle(tiny_model("llama"), 3, layers=[1], router="noisy_topk", keep_dense=True)
    with pytest.raises(SurgeryError, match="router topk") as caught:
        make("lifelong-moe", made)
    assert caught.value.code == "unknown_mixture"


def test_a_group_of_one_expert_is_a_plain_dense_model(tiny_folder, tmp_path):
    run = train(tiny_folder, tmp_path / "run", "pangu-sigma", settings=QUICK | {"experts_per_group": 1})
    task = run.results["tasks"][0]
    done = extract_run(tmp_path / "run", task, tmp_path / "sub")
    assert done["model_type"] == "llama"
    expected = answers(run.model.eval(), task)
    with torch.no_grad():
        found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "sub")(input_ids=batch(4) % 50).logits
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5 * float(expected.abs().max()))


def test_an_interrupted_run_resumes_to_the_same_results(finished, tiny_folder, tmp_path, monkeypatch):
    name, whole, _ = finished

    def run(out, **more):
        train(tiny_folder, out, name, **more)

    cls, calls = method_class(name), []
    end_task = cls.end_task

    def interrupted(self, task):
        calls.append(task)
        if len(calls) == 2:
            raise KeyboardInterrupt
        end_task(self, task)

    monkeypatch.setattr(cls, "end_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part")
    monkeypatch.undo()
    run(tmp_path / "part", resume=True)
    assert not verify_path(tmp_path / "part", against=whole).problems


@pytest.mark.parametrize("maker", [mixtral, qwen2_moe])
def test_the_mixtures_of_a_moe_model_are_continued(maker):
    model = maker()
    with torch.no_grad():
        plain = model(input_ids=batch(9)).logits
    method = make("lifelong-moe", model, add=1)
    assert all(layer.num_experts == 4 for layer in method.layers.values()) and len(method.layers) == 2
    base = logits(method, None)
    torch.testing.assert_close(base, plain, rtol=0.0, atol=1e-5 * float(plain.abs().max()))
    losses = learn(method, "one", 0)
    assert losses[-1] < losses[0] and torch.equal(logits(method, None), base)
    assert all(layer.num_experts == 5 for layer in method.layers.values())


def test_new_experts_are_copies_of_the_most_used_on_the_new_data():
    method = make("lifelong-moe", mixtral(), add=1, noise=0.0)
    ids = batch(5)
    method.see_task([{"input_ids": row} for row in ids.tolist()])
    method.begin_task("one", None, None, None)
    with torch.no_grad(), method.context.use(visible=method._base), method.watch() as seen:
        for row in ids:
            method.model(input_ids=row[None])
    for path, layer in method.layers.items():
        load = sum(routed.load for where, routed in seen if where == path)
        best = int(load.argmax())
        assert torch.equal(layer.free_into[0], layer.into[best]) and torch.equal(layer.free_gate[0], layer.gate[best])


def test_the_distillation_loss_is_kl_to_the_model_of_before(tiny_model):
    method = make("lifelong-moe", tiny_model("llama"), kl=2.0, balance_weight=0.0)
    learn(method, "one", 0)
    old = logits(method, "one", batch(1))
    method.see_task([])
    method.begin_task("two", None, None, None)
    with torch.no_grad():
        for layer in method.layers.values():
            layer.free_into.mul_(3.0)
    ids = batch(1)
    labels = ids.clone()
    labels[:, :4] = -100
    with method.watch() as seen:
        output = method.model(input_ids=ids, labels=labels)
    found = method.extra_loss(method.model, {"input_ids": ids, "labels": labels}, output, seen)
    p, q = old[:, 3:-1].log_softmax(-1), output.logits[:, 3:-1].log_softmax(-1)
    expected = 2.0 * (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert bool(expected > 0)
    found.backward()
    assert all(p.grad is not None for p in method.model.parameters() if p.requires_grad)


def test_kl_holds_the_new_model_near_the_old_one(tiny_model):
    drift = {}
    for kl in (0.0, 50.0):
        method = make("lifelong-moe", tiny_model("llama"), kl=kl, known_domain=False)
        base = logits(method, None, batch(0))
        learn(method, "one", 0, steps=12)
        drift[kl] = float((logits(method, "one", batch(0)) - base).square().mean())
    assert drift[50.0] < 0.5 * drift[0.0]


def test_a_trained_trunk_is_saved_with_the_latest_task_and_the_base_still_answers(tiny_model):
    method = make("lifelong-moe", tiny_model("llama"), train_trunk=True)
    base = logits(method, None)
    before = method.model.model.embed_tokens.weight.detach().clone()
    for number, task in enumerate(("one", "two")):
        learn(method, task, number)
        assert torch.equal(logits(method, None), base)
    assert not torch.equal(method.model.model.embed_tokens.weight, before)
    assert method.rewritten("two") == ["one"]
    tensors = {task: method.task_tensors(task) for task in ("one", "two")}
    assert not any(key.startswith("trunk.") for key in tensors["one"])
    other = make("lifelong-moe", tiny_model("llama"), train_trunk=True)
    other.registry = copy.copy(method.registry)
    for task, parts in tensors.items():
        other.load_task(task, parts)
    for task in (None, "one", "two"):
        assert torch.equal(logits(other, task), logits(method, task))


def test_the_old_model_is_no_second_copy_where_the_trunk_is_frozen(tiny_model):
    held = {}
    for trained in (False, True):
        method = make("lifelong-moe", tiny_model("llama"), train_trunk=trained)
        learn(method, "one", 0, steps=1)
        held[trained] = sum(value.numel() for value in method._old_trunk.values())
    trunk = sum(p.numel() for name, p in tiny_model("llama").named_parameters() if ".layers.1.mlp." not in name)
    assert held == {False: 0, True: trunk}


def test_forgetting_the_latest_task_keeps_the_trained_trunk(tiny_folder, tmp_path):
    run = train(tiny_folder, tmp_path / "run", "lifelong-moe", settings=QUICK | {"train_trunk": True})
    first, last = run.results["tasks"][0], run.results["tasks"][-1]
    checkpoint.forget_task(tmp_path / "run", last)
    assert torch.equal(answers(moses.load(tmp_path / "run"), first), answers(run.model.eval(), first))


def test_a_budget_is_kept_by_giving_up_the_least_used_experts(tiny_folder, tmp_path):
    limit = {"identifier.num_features": 16, "add": 2}
    budget = 3 * 26_000
    run = train(tiny_folder, tmp_path / "run", "lifelong-moe", settings=QUICK | limit, budget=budget)
    held = sum(
        file.stat().st_size
        for file in (tmp_path / "run").rglob("*")
        if file.parent.parent.name in ("tasks", "identifier") or file.parent.name == "identifier"
    )
    assert held <= budget and run.results["budget"]["given_up"]
    assert not verify_path(tmp_path / "run").problems
    experts = run.model._answering.layers["model.layers.1.mlp"].num_experts
    assert 1 < experts < 7
    loaded = moses.load(tmp_path / "run")
    for task in run.results["tasks"]:
        assert torch.equal(answers(loaded, task), answers(run.model.eval(), task))


def test_unknown_domains_are_answered_with_every_expert(tiny_model):
    method = make("lifelong-moe", tiny_model("llama"), known_domain=False)
    learn(method, "one", 0)
    after = logits(method, "one")
    learn(method, "two", 1)
    assert not torch.equal(logits(method, "one"), after)
    assert torch.equal(logits(method, "one"), logits(method, "two"))


def test_a_group_that_starts_from_a_similar_one_starts_as_it(tiny_model):
    method = make("pangu-sigma", tiny_model("llama"), source="similar", upper=1.0)
    assert method.reads_similar and len(method.layers) == 2
    learn(method, "one", 0)
    method.begin_task("two", None, None, "one")
    with torch.no_grad():
        new = method.model(input_ids=batch(9)).logits
    method.end_task("two")
    assert torch.equal(new, logits(method, "one")) and torch.equal(new, logits(method, "two"))


def test_balanced_tables_share_the_tasks_tokens_out(tiny_model):
    # a Zipf-like text: a few token ids are most of it
    generator = torch.Generator().manual_seed(0)
    ids = (3 + 90 * torch.rand((40, 50), generator=generator) ** 3).long()
    spread = {}
    for table in ("uniform", "balanced"):
        method = make("pangu-sigma", tiny_model("llama"), table=table, upper=1.0)
        method.see_task([{"input_ids": row} for row in ids.tolist()])
        method.begin_task("one", None, None, None)
        with torch.no_grad(), method.watch() as seen:
            method.model(input_ids=ids)
        loads = [routed.load[1:5].double() for _, routed in seen]
        assert all(int(load.sum()) == ids.numel() for load in loads)
        spread[table] = max(float(load.std(correction=0) / load.mean()) for load in loads)
    assert spread["balanced"] < 0.05 < spread["uniform"]
    tables = [layer.tables[0] for layer in method.layers.values()]
    assert not torch.equal(*tables)


def test_generation_with_a_cache_routes_the_new_tokens(tiny_model):
    method = make("pangu-sigma", tiny_model("llama"), upper=1.0)
    learn(method, "one", 0)
    with method.answer("one"):
        found = [
            method.model.generate(batch(2), max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)
            for cache in (True, False)
        ]
    assert torch.equal(*found)


def test_a_deep_copy_is_a_model_of_its_own(tiny_model):
    method = make("pangu-sigma", tiny_model("llama"))
    learn(method, "one", 0)
    twin = copy.deepcopy(method.model)
    with twin.task("one"), torch.no_grad():
        assert torch.equal(twin(input_ids=batch(9)).logits, logits(method, "one"))


def test_what_does_not_fit_is_refused(tiny_model):
    cases = [
        ("lifelong-moe", "bert", {}, ModelError, "unknown_architecture"),
        ("pangu-sigma", "t5", {}, ModelError, "unknown_architecture"),
        ("lifelong-moe", "gpt2", {}, SurgeryError, "not_upcyclable"),
        ("lifelong-moe", "llama", {"layers": (5,)}, SurgeryError, "unknown_layer"),
        ("lifelong-moe", "llama", {"add": 0}, ConfigError, "bad_setting"),
        ("pangu-sigma", "llama", {"table": "sorted"}, ConfigError, "bad_setting"),
    ]
    for name, family, settings, error, code in cases:
        model = tiny_model(family)
        with pytest.raises(error) as caught:
            make(name, model, **settings)
        assert caught.value.code == code and "\n" not in str(caught.value)
        assert not any(isinstance(part, GrowingLayer) for part in model.modules())
    method = make("lifelong-moe", tiny_model("llama"))
    with pytest.raises(ModelError) as caught:
        make("lifelong-moe", method.model)
    assert caught.value.code == "already_attached"


def test_damaged_files_of_a_task_are_refused(tiny_model):
    method = make("pangu-sigma", tiny_model("llama"))
    learn(method, "one", 0)
    tensors = method.task_tensors("one")
    for change in (
        {"weights": tensors["weights"][:-1]},
        {"weights": tensors["weights"].float()},
        {"tables": tensors["tables"] + 1},
        {"tables": tensors["tables"][:, 1:]},
    ):
        other = make("pangu-sigma", tiny_model("llama"))
        other.registry = method.registry
        with pytest.raises(FormatError) as caught:
            other.load_task("one", tensors | change)
        assert caught.value.code == "bad_tensors"
