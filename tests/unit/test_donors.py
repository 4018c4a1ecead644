"""The donor of a new task is the ended task that serves its examples best, and nobody where the base model does better."""

from __future__ import annotations

import pytest
import torch

import moses
from moses.donors import DonorProbe, left_out_error
from moses.methods import method_class


class Padding:
    pad_token_id = 0


def left_out_by_hand(features, labels, ridge):
    """The same error by fitting a ridge regression as often as there are examples."""
    x = features - features.mean(0)
    y = torch.nn.functional.one_hot(labels).double()
    y = y - y.mean(0)
    strength = ridge * float(torch.linalg.eigvalsh(x @ x.T).clamp(min=0).mean())
    total = 0.0
    for i in range(len(x)):
        rest = [j for j in range(len(x)) if j != i]
        xr, yr = x[rest], y[rest]
        mx, my = xr.mean(0), yr.mean(0)
        gram = (xr - mx).T @ (xr - mx) + strength * torch.eye(x.shape[1]).double()
        weights = torch.linalg.solve(gram, (xr - mx).T @ (yr - my))
        total += float(((y[i] - my - (x[i] - mx) @ weights) ** 2).sum())
    return total / float((y * y).sum())


def test_the_closed_form_leaves_each_example_out_once(monkeypatch):
    torch.manual_seed(0)
    features, labels = torch.randn(12, 3).double(), torch.tensor([0, 1, 2] * 4)
    monkeypatch.setattr("moses.donors.RIDGES", (0.1,))
    assert left_out_error(features, labels) == pytest.approx(left_out_by_hand(features, labels, 0.1), rel=1e-9)


def test_features_that_tell_the_labels_cost_less_than_features_that_do_not():
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    useful = torch.nn.functional.one_hot(labels).double() + 0.1 * torch.randn(60, 3).double()
    assert left_out_error(useful, labels) < 0.2 < 0.9 < left_out_error(torch.randn(60, 3).double(), labels)


def rows_of(batch):
    return [
        {name: (value.tolist() if value.dim() else int(value)) for name, value in zip(batch, row, strict=True)}
        for row in zip(*batch.values(), strict=True)
    ]


def learn(method, name, batch, num_labels=None, sign=1.0):
    method.begin_task(name, None, num_labels, None)
    optimizer = torch.optim.AdamW([p for p in method.model.parameters() if p.requires_grad], lr=0.03)
    for step in range(25):
        optimizer.zero_grad()
        (sign * method.model(**batch).loss).backward()
        optimizer.step()
        if step == 12:
            method.model.cut_task()
    method.end_task(name)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_task_that_learned_the_same_examples_is_the_donor(family, tiny_model, tiny_batch):
    torch.manual_seed(0)
    method = method_class("moses")(tiny_model(family), moses.MosesConfig(rank=4, density=0.5))
    own, other = tiny_batch(family, rows=24, seed=3), tiny_batch(family, rows=24, seed=4)
    probe = DonorProbe(method, Padding(), "float32", 8, epochs=5)
    assert probe.best(rows_of(own)) is None, "there is no task yet"
    for name, batch in (("other", other), ("own", own), ("third", tiny_batch(family, rows=24, seed=5))):
        learn(method, name, batch, 2 if family == "bert" else None)
    before, chosen = method.model.state_dict(), method.model._context.groups
    assert probe.best(rows_of(own)) == "own"
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.model.state_dict().items())
    assert method.model._context.groups == chosen


def test_where_the_base_model_serves_best_a_task_starts_afresh(tiny_model, tiny_batch):
    method = method_class("moses")(tiny_model("llama"), moses.MosesConfig(rank=4, density=0.5))
    batch = tiny_batch("llama", rows=8)
    learn(method, "wrong", batch, sign=-1.0)
    assert DonorProbe(method, Padding(), "float32", 8, epochs=5).best(rows_of(batch)) is None


def test_the_probe_asks_for_a_share_of_what_training_costs(tiny_model, tiny_batch, monkeypatch):
    method = method_class("moses")(tiny_model("llama"), moses.MosesConfig(rank=4, density=0.5))
    rows, asked = rows_of(tiny_batch("llama", rows=200)), []
    for name in "ab":
        learn(method, name, tiny_batch("llama"))
    monkeypatch.setattr(DonorProbe, "_cost", lambda self, name, sample: asked.append(len(sample)) or 1.0)
    for epochs in (1, 3, 50):
        DonorProbe(method, Padding(), "float32", 8, epochs).best(rows)
    assert asked == [20] * 3 + [60] * 3 + [200] * 3
