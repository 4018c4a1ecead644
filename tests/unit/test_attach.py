"""Attachment to every family: nothing changes until a task is trained, and then only what the task owns."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import moses
from moses.subexperts import SubExpertFFN, SubExpertLinear

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2", "phi", "bert", "t5")
# Linear maps that the default attaches at, in two blocks.
PLACES = {"gpt2": 6, "phi": 8, "bert": 8, "t5": 2 * 2 + 2 * 4 + 8}
# Where there are experts beside the FFN: the linear maps of the attention, and the FFNs.
ATTENTION = {"gpt2": 2, "t5": 2 * 2 + 2 * 4}
FFNS = {
    "bert": "bert.encoder.layer.1.output",
    "gpt2": "transformer.h.1.mlp",
    "t5": "decoder.block.1.layer.2.DenseReluDense",
}
BANKS = {
    "rank": {},
    "element": {"granularity": "element"},
    "adapter": {"ffn_experts": "adapter"},
    "adapter-element": {"ffn_experts": "adapter", "granularity": "element"},
}


def begin(model, name="a", **extra):
    return model.begin_task(name, num_labels=2 if model._head is not None else None, **extra)


def train_steps(model, batch, steps=3, lr=0.05):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    return optimizer


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits.clone()


@pytest.mark.parametrize("family", FAMILIES)
def test_attached_model_answers_as_before_until_a_task_is_trained(family, tiny_model, tiny_batch):
    model, batch = tiny_model(family), tiny_batch(family)
    before = logits(model, batch)
    kind = type(model)
    attached = moses.attach(model)
    assert attached is model and isinstance(model, kind)
    assert sum(isinstance(module, SubExpertLinear) for module in model.modules()) == PLACES.get(family, 10)
    begin(model)
    if family != "bert":  # BERT's head is the task's own from the start
        assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_stand_beside_every_ffn_and_low_rank_banks_at_attention_only(family, tiny_model, tiny_batch):
    model, batch = tiny_model(family), tiny_batch(family)
    before = logits(model, batch)
    kind, whole = type(model), moses.attach(tiny_model(family)).bank_bytes
    attached = moses.attach(model, moses.MosesConfig(ffn_experts="adapter"))
    kinds = [type(layer) for layer in attached._banks().values()]
    assert kinds.count(SubExpertLinear) == ATTENTION.get(family, 4) and kinds.count(SubExpertFFN) == len(
        kinds
    ) - ATTENTION.get(family, 4)
    assert kinds.count(SubExpertFFN) == (4 if family == "t5" else 2)
    assert isinstance(model.get_submodule(FFNS.get(family, "model.layers.1.mlp")), SubExpertFFN)
    assert list(attached._banks()) == [layer.name for layer in attached.registry.layers()]
    others = 2 if family == "t5" else 0  # values of cross-attention, which read the encoder's tokens
    assert len(attached._routers()) == kinds.count(SubExpertFFN) + others, "one router a block"
    assert 0.95 * whole < attached.bank_bytes <= whole, "density means as many bytes as without"
    begin(model)
    if family != "bert":
        assert torch.equal(logits(model, batch), before)
    moses.detach(model)
    assert type(model) is kind and list(model.state_dict()) == list(tiny_model(family).state_dict())
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bank", BANKS)
def test_a_task_learns_and_only_its_own_parameters_are_trainable(family, bank, tiny_model, tiny_batch):
    model, batch = (
        moses.attach(tiny_model(family), moses.MosesConfig(rank=4, **BANKS[bank], density=0.3, warmup=0.5)),
        tiny_batch(family),
    )
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    begin(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all(
        "bank.free" in name or "bank.score" in name or name.endswith("router.weight") or "classifier" in name
        for name in names
    )
    with torch.no_grad():
        first = model(**batch).loss
    train_steps(model, batch, 8)
    model.end_task("a")
    with model.task("a"), torch.no_grad():
        assert model(**batch).loss < first
    assert not any(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert all(
        torch.equal(after[name], tensor)
        for name, tensor in frozen.items()
        if ".bank." not in name and ".frozen" not in name
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("reuse", ["none", "similar", "all"])
def test_old_tasks_keep_their_bits_under_adamw_with_decay(dtype, bank, reuse, tiny_model, tiny_batch):
    model = moses.attach(
        tiny_model("llama").to(dtype), moses.MosesConfig(rank=4, **BANKS[bank], density=0.2, reuse=reuse)
    )
    answers, batches = {}, {name: tiny_batch("llama", seed=index + 2) for index, name in enumerate("abc")}
    for name, batch in batches.items():
        begin(model, name, similar_to="a" if name != "a" else None)
        train_steps(model, batch, 2)
        model.cut_task()
        train_steps(model, batch, 3)
        model.end_task(name)
        for other in batches:
            if other <= name:
                with model.task(other):
                    found = logits(model, batches[other])
                assert torch.equal(answers.setdefault(other, found), found), (
                    f"task {other} moved while {name} was learned"
                )
    assert len({tensor.sum().item() for tensor in answers.values()}) == 3
    with model.base():
        base = logits(model, batches["a"])
    assert torch.equal(base, logits(tiny_model("llama").to(dtype), batches["a"]))


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_was_trained_is_what_answers(family, bank, tiny_model, tiny_batch):
    config = moses.MosesConfig(density=0.3, **BANKS[bank])
    model, batch = moses.attach(tiny_model(family), config), tiny_batch(family)
    for name in "ab":
        begin(model, name, similar_to="a" if name == "b" else None)
        train_steps(model, batch, 2)
        model.cut_task()
        train_steps(model, batch, 3)
        in_training = logits(model, batch)
        model.end_task(name)
        with model.task(name):
            torch.testing.assert_close(logits(model, batch), in_training, rtol=1e-4, atol=1e-5)
    assert model.registry.overlap()[0][1] > 0, "nothing was reused, so nothing was shown"


@pytest.mark.parametrize("bank", BANKS)
def test_budgets_hold_however_much_is_reused(bank, tiny_model, tiny_batch):
    config = moses.MosesConfig(density=0.25, growth=0.4, reuse="all", **BANKS[bank])
    model = moses.attach(tiny_model("llama"), config)
    for name in "abcd":
        begin(model, name)
        train_steps(model, tiny_batch("llama"), 2)
        model.end_task(name)
    banks = [layer.bank for layer in model._banks().values()]
    total = sum((one.d_in + one.d_out) * one.num_experts * one.rank * 2 for one in banks)
    new = [model.registry.new_bytes(info.id) for info in model.registry.tasks()]
    overlap = model.registry.overlap()
    assert 0.2 * total < new[0] <= 0.25 * total
    assert all(0 < cost <= 0.1 * total for cost in new[1:])
    assert all(overlap[task][task] <= 0.25 * total for task in range(4)), "a mask is larger than density"
    assert all(overlap[task][task] > new[task] for task in range(1, 4)), "nothing was reused"


@pytest.mark.parametrize("bank", BANKS)
def test_a_full_bank_grows_and_old_tasks_do_not_notice(bank, tiny_model, tiny_batch):
    config = moses.MosesConfig(num_experts=2, rank=2, density=1.0, growth=1.0, **BANKS[bank], reuse="none")
    model, batch = moses.attach(tiny_model("llama"), config), tiny_batch("llama")
    begin(model, "a")
    train_steps(model, batch)
    model.end_task("a")
    with model.task("a"):
        before = logits(model, batch)
    begin(model, "b")
    assert all(len(layer.expert_ids) == 3 for layer in model.registry.layers())
    train_steps(model, batch)
    model.end_task("b")
    with model.task("a"):
        assert torch.equal(logits(model, batch), before)
    with model.task("b"):
        assert not torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("bank", ["rank", "adapter"])
def test_forgetting_a_task_leaves_the_others_and_frees_only_its_own(bank, tiny_model, tiny_batch):
    model, batch = moses.attach(tiny_model("llama"), moses.MosesConfig(density=0.2, **BANKS[bank])), tiny_batch("llama")
    for name in "abc":
        begin(model, name, similar_to="a" if name == "b" else None)
        train_steps(model, batch, 2)
        model.end_task(name)
    kept = {}
    for name in "bc":
        with model.task(name):
            kept[name] = logits(model, batch)
    shared = model.registry.overlap()[0][1]
    used = model.registry.used_bytes()
    own = model.registry.new_bytes(0)
    assert shared > 0
    freed = model.forget_task("a")
    assert freed == own - shared
    assert model.registry.used_bytes() == used - freed
    for name in "bc":
        with model.task(name):
            assert torch.equal(logits(model, batch), kept[name])
    with pytest.raises(moses.MosesError), model.task("a"):
        pass


@pytest.mark.parametrize("open_task", [False, True])
@pytest.mark.parametrize("bank", ["rank", "adapter"])
def test_deepcopy_and_pickle_give_a_model_of_its_own(bank, open_task, tiny_model, tiny_batch):
    model, batch = moses.attach(tiny_model("llama"), moses.MosesConfig(**BANKS[bank])), tiny_batch("llama")
    begin(model)
    train_steps(model, batch)
    if not open_task:
        model.end_task("a")
        model._context.groups = ()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        if open_task:
            assert torch.equal(logits(twin, batch), logits(model, batch))
            train_steps(twin, batch)
            assert not torch.equal(logits(twin, batch), logits(model, batch))
            twin.end_task("a")
        else:
            with twin.task("a"), model.task("a"):
                assert torch.equal(logits(twin, batch), logits(model, batch))
            begin(twin, "b")
        assert len(twin.registry.tasks()) == (1 if open_task else 2)
    assert [info.state for info in model.registry.tasks()] == ["open" if open_task else "ended"]


@pytest.mark.parametrize("bank", ["rank", "adapter"])
def test_state_dict_round_trip(bank, tiny_model, tiny_batch):
    batch = tiny_batch("llama")
    model, twin = (moses.attach(tiny_model("llama"), moses.MosesConfig(**BANKS[bank])) for _ in range(2))
    for one in (model, twin):
        begin(one)
    train_steps(model, batch)
    assert not torch.equal(logits(twin, batch), logits(model, batch))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin, batch), logits(model, batch))


@pytest.mark.parametrize("bank", ["rank", "adapter"])
def test_rows_of_one_batch_get_their_own_tasks(bank, tiny_model, tiny_batch):
    model = moses.attach(tiny_model("llama"), moses.MosesConfig(**BANKS[bank]))
    batch = tiny_batch("llama", rows=4)
    for seed, name in enumerate("ab"):
        begin(model, name)
        train_steps(model, tiny_batch("llama", seed=seed + 5), 6)
        model.end_task(name)
    alone = {}
    for name in "ab":
        with model.task(name):
            alone[name] = logits(model, batch)
    with model.base():
        alone["base"] = logits(model, batch)
    with model.tasks_of_rows(torch.tensor([1, 0, -1, 1])):
        mixed = logits(model, batch)
    for row, name in enumerate(["b", "a", "base", "b"]):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(alone["a"][0], alone["b"][0], rtol=1e-3, atol=1e-4)


def test_heads_of_one_batch_are_padded_to_the_widest(tiny_model, tiny_batch):
    model, batch = moses.attach(tiny_model("bert")), tiny_batch("bert", rows=3)
    del batch["labels"]
    for name, labels in (("two", 2), ("five", 5)):
        model.begin_task(name, num_labels=labels)
        model.end_task(name)
    with model.tasks_of_rows(torch.tensor([0, 1, 0])):
        found = logits(model, batch)
    assert found.shape == (3, 5)
    assert torch.isneginf(found[[0, 2], 2:]).all() and torch.isfinite(found[1]).all()
    with model.task("two"):
        assert logits(model, batch).shape == (3, 2)
    with pytest.raises(moses.MosesError, match="no task is active"), model.base():
        model(**batch)


@pytest.mark.parametrize("bank", ["rank", "adapter"])
def test_generate_and_gradient_checkpointing_work(bank, tiny_model, tiny_batch):
    model, batch = moses.attach(tiny_model("llama"), moses.MosesConfig(**BANKS[bank])), tiny_batch("llama")
    begin(model)
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    train_steps(model, batch)
    model.activation_checkpointing_disable()
    model.end_task("a")
    with model.task("a"):
        tokens = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=5, do_sample=False
        )
        first = model(batch["input_ids"]).logits[:, -1].argmax(-1)
    assert 8 <= tokens.shape[1] <= 12
    assert torch.equal(first, tokens[:, 7])


@pytest.mark.parametrize("bank", BANKS)
def test_compile_has_no_graph_break_in_a_bank(bank, tiny_model, tiny_batch):
    model, batch = moses.attach(tiny_model("llama"), moses.MosesConfig(**BANKS[bank])), tiny_batch("llama")
    begin(model)
    train_steps(model, batch)
    model.end_task("a")
    block = model.model.layers[0]
    hidden = torch.randn(2, 5, 32)
    positions = torch.arange(5)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    with model.task("a"), torch.no_grad():
        eager = block(hidden, position_embeddings=rotary)
        compiled = torch.compile(block, fullgraph=True, backend="eager")(hidden, position_embeddings=rotary)
    torch.testing.assert_close(compiled, eager)


def test_detach_gives_the_model_back(tiny_model, tiny_batch):
    model, batch = tiny_model("bert"), tiny_batch("bert")
    kind, keys, before = type(model), list(model.state_dict()), logits(model, batch)
    moses.attach(model)
    begin(model)
    train_steps(model, batch)
    assert moses.detach(model) is model
    assert type(model) is kind and list(model.state_dict()) == keys
    assert torch.equal(logits(model, batch), before)


def test_unknown_architectures_and_names_are_refused_with_what_there_is(tiny_model):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = torch.nn.Linear(4, 4)

    with pytest.raises(moses.MosesError, match=r"mixer") as caught:
        moses.attach(Odd())
    assert caught.value.code == "unknown_architecture"
    with pytest.raises(moses.MosesError, match=r"q_porj.*q_proj") as caught:
        moses.attach(tiny_model("llama"), moses.MosesConfig(target_modules=("q_porj",)))
    assert caught.value.code == "unknown_module"
    attached = moses.attach(tiny_model("llama"), moses.MosesConfig(target_modules=r".*\.o_proj"))
    assert len(attached._banks()) == 2
    with pytest.raises(moses.MosesError, match="already"):
        moses.attach(attached)


def test_where_no_ffn_can_be_told_its_experts_are_refused(tiny_model):
    import transformers as hf

    config = moses.MosesConfig(ffn_experts="adapter")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97}
    opt = hf.OPTForCausalLM(hf.OPTConfig(**sizes, ffn_dim=48, word_embed_proj_dim=32))
    with pytest.raises(moses.MosesError, match=r"'opt' has no module that is its FFN.*llama") as caught:
        moses.attach(opt, config)
    assert caught.value.code == "unknown_architecture" and not isinstance(opt, moses.attached.MosesModel)
    stablelm = hf.StableLmForCausalLM(hf.StableLmConfig(**sizes, intermediate_size=48, num_key_value_heads=4))
    named = moses.MosesConfig(ffn_experts="adapter", target_modules=("q_proj",))
    with pytest.raises(moses.MosesError, match="'stablelm' is not known") as caught:
        moses.attach(stablelm, named)
    assert caught.value.code == "unknown_architecture"
    for family, name in (("llama", "gate_proj"), ("bert", "intermediate.dense")):
        with pytest.raises(moses.MosesError, match=name) as caught:
            moses.attach(tiny_model(family), moses.MosesConfig(ffn_experts="adapter", target_modules=name))
        assert caught.value.code == "bad_setting"
    own = moses.attach(
        tiny_model("bert"), moses.MosesConfig(ffn_experts="adapter", target_modules=("key", "attention.output.dense"))
    )
    assert [path.split(".", 3)[3] for path in own._banks()][:3] == [
        "0.attention.self.key",
        "0.attention.output.dense",
        "0.output",
    ]


def test_nan_activations_are_an_error_and_no_route(tiny_model, tiny_batch):
    model, batch = moses.attach(tiny_model("llama")), tiny_batch("llama")
    begin(model)
    model.end_task("a")
    with torch.no_grad():
        model.model.embed_tokens.weight[batch["input_ids"][0, 0]] = float("nan")
    with pytest.raises(moses.MosesError, match="not finite") as caught, model.task("a"):
        model(**batch)
    assert caught.value.code == "router_not_finite"


@pytest.mark.parametrize("bank", ["rank", "adapter"])
def test_trainable_parameters_are_counted_as_in_peft(bank, tiny_model):
    model = moses.attach(tiny_model("llama"), moses.MosesConfig(**BANKS[bank]))
    assert model.get_nb_trainable_parameters()[0] == 0
    begin(model)
    trainable, total = model.get_nb_trainable_parameters()
    assert 0 < trainable < total
    opened = sum(layer.bank.free_A.numel() + layer.bank.free_B.numel() for layer in model._banks().values())
    assert trainable == opened + sum(router.weight.numel() for router in model._routers().values())


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_was_trained_answers_also_where_weights_are_rounded(bank, dtype, tiny_model, tiny_batch):
    config = moses.MosesConfig(rank=4, density=0.3, **BANKS[bank], weight_dtype=dtype)
    model, batch = moses.attach(tiny_model("llama"), config), tiny_batch("llama")
    begin(model)
    train_steps(model, batch, 2)
    model.cut_task()
    train_steps(model, batch, 2)
    trained = logits(model, batch)
    free = [p for name, p in model.named_parameters() if "free" in name]
    assert free and all(parameter.dtype == torch.float32 for parameter in free), "the optimizer's weights are float32"
    model.end_task("a")
    with model.task("a"):
        assert torch.equal(logits(model, batch), trained)
    weights = model.task_tensors(0)["weights"]
    assert weights.dtype == getattr(torch, dtype)
    assert weights.numel() * weights.element_size() == model.registry.new_bytes(0)


def test_rounded_weights_survive_a_move_to_another_dtype(tiny_model, tiny_batch):
    model, batch = moses.attach(tiny_model("llama"), moses.MosesConfig(rank=4, density=0.3)), tiny_batch("llama")
    begin(model)
    train_steps(model, batch)
    model.end_task("a")
    hashed = model.registry.task("a").content_hash
    model.to(torch.float64)
    assert model.registry.content_hash(0, model.owned_values()) == hashed


def test_a_head_reads_features_of_unit_size_unless_told_otherwise(tiny_model, tiny_batch):
    batch = tiny_batch("bert")
    seen = {}
    for norm in (True, False):
        model = moses.attach(tiny_model("bert"), moses.MosesConfig(head_norm=norm))
        begin(model)
        with torch.no_grad():
            model.bert.pooler.dense.weight.mul_(1e-3)
            model.bert.pooler.dense.bias.zero_()
        seen[norm] = logits(model, batch).std()
    assert seen[True] > 100 * seen[False] > 0
