"""A cheaper step has the same loss and gradients, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import moses
from moses.cheaper import at_learned_columns, training_attention
from moses.stream.prompt import IGNORED


def prompts(batch, short=3):
    """The batch with labels on the last tokens of each row alone, and one row that ends earlier."""
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[:, -short:] = batch["input_ids"][:, -short:]
    labels[0, -1] = IGNORED
    return batch | {"labels": labels}


@pytest.mark.parametrize(
    ("family", "wrapped"),
    [
        ("llama", "no"),
        ("gpt2", "no"),
        ("gemma", "no"),
        ("mixtral", "no"),
        ("llama", "moses"),
        ("gpt2", "moses"),
        ("llama", "peft"),
    ],
)
def test_loss_and_gradients_are_the_same(family, wrapped, tiny_model, tiny_mixture, tiny_batch):
    model = tiny_mixture(family) if family == "mixtral" else tiny_model(family)
    if wrapped == "moses":
        model = moses.attach(model, moses.MosesConfig(density=1.0))
        model.begin_task("a")
    elif wrapped == "peft":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.eval()
    inputs = prompts(tiny_batch("llama"))
    narrow = at_learned_columns(model, inputs)
    assert narrow["logits_to_keep"].tolist() == [inputs["labels"].shape[1] - 4 + step for step in range(3)]
    found = []
    for given in (inputs, narrow):
        output = model(**given, num_items_in_batch=torch.tensor(5))
        output.loss.backward()
        found.append((output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    (whole, gradients), (some, others) = found
    assert some.logits.shape[1] == 3 < whole.logits.shape[1]
    torch.testing.assert_close(some.loss, whole.loss, rtol=1e-6, atol=1e-6)
    assert gradients and gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)


def test_what_has_no_columns_to_choose_stays(tiny_model, tiny_batch):
    for family in ("bert", "t5"):
        batch = tiny_batch(family)
        assert at_learned_columns(tiny_model(family), batch).keys() == batch.keys()
    nothing = tiny_batch("llama")
    nothing["labels"] = torch.full_like(nothing["input_ids"], IGNORED)
    assert at_learned_columns(tiny_model("llama"), nothing).keys() == nothing.keys()


def test_short_rows_in_half_precision_are_trained_by_matrix_products(tiny_model):
    model = tiny_model("llama")
    model.set_attn_implementation("sdpa")
    for length, half, expected in ((100, True, "eager"), (100, False, "sdpa"), (1000, True, "sdpa")):
        with training_attention(model, length, half):
            assert model.config._attn_implementation == expected
        assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), training_attention(model, 100, True):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("method", "settings", "whole"),
    [
        ("finetune", {"kl": 0.5}, True),
        ("finetune", {}, False),
        ("lifelong-moe", {}, True),
        ("lifelong-moe", {"kl": 0.0}, False),
        ("moses", {}, False),
    ],
)
def test_methods_that_compare_logits_are_given_all_of_them(method, settings, whole, tiny_model):
    from moses.methods import method_class

    cls = method_class(method)
    assert cls(tiny_model("llama"), cls.config_class(**settings)).reads_logits is whole
