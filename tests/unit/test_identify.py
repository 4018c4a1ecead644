"""The task identifier's parts: settings, views of prompts, features of every family, each kind's answers, stored
state."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from moses.errors import ConfigError, FormatError, ModelError, RegistryError
from moses.stream.identify import (
    IdentifierConfig,
    TaskIdentifier,
    features_of_encoded,
    layer_features,
    prompt_features,
    prompt_views,
    without_template,
)
from moses.stream.identify.config import MAX_FEATURES, MAX_TASK_BYTES
from moses.stream.identify.lift import RandomFeatures

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2", "phi", "bert", "t5")
SMALL = IdentifierConfig(num_features=24, ridge=1.0)


def clusters(num_tasks: int, rows: int = 40, dim: int = 12, seed: int = 0, spread: float = 0.3) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    centres = random.standard_normal((num_tasks, 2, dim))
    return [centre + spread * random.standard_normal((rows, 2, dim)) for centre in centres]


def fitted(tasks: list[np.ndarray], config: IdentifierConfig = SMALL) -> TaskIdentifier:
    identifier = TaskIdentifier(config, tasks[0].shape[-1])
    for task_id, features in enumerate(tasks):
        identifier.add_task(task_id, features)
    return identifier


# settings


@pytest.mark.parametrize(
    "setting",
    [
        {"kind": "nearest"},
        {"num_features": 1},
        {"num_features": MAX_FEATURES + 1},
        {"num_features": 8.0},
        {"layer": -1},
        {"layer": True},
        {"ridge": -0.1},
        {"ridge": float("nan")},
        {"threshold": -1.0},
        {"seed": 2**32},
    ],
)
def test_a_setting_out_of_range_is_named(setting):
    with pytest.raises(ConfigError, match=f"identifier.{next(iter(setting))} is") as caught:
        IdentifierConfig(**setting)
    assert caught.value.code == "bad_identifier"


def test_the_largest_state_fits_its_half_megabyte():
    features = np.random.default_rng(0).standard_normal((3, 2, 5))
    identifier = TaskIdentifier(IdentifierConfig(num_features=MAX_FEATURES), 5)
    identifier.add_task(0, features)
    assert identifier.nbytes(0) <= MAX_TASK_BYTES == 500_000
    with pytest.raises(ConfigError, match="keep"):
        TaskIdentifier(IdentifierConfig(kind="cosine"), 100_000)


def test_nbytes_is_the_size_of_the_file(tmp_path):
    from safetensors.numpy import load_file, save_file

    identifier = fitted(clusters(2))
    save_file(identifier.task_state(1), tmp_path / "state.safetensors")
    assert (tmp_path / "state.safetensors").stat().st_size == identifier.nbytes(1)
    identifier.remove_task(1)
    identifier.load_task_state(1, load_file(tmp_path / "state.safetensors"))


# views of prompts


def test_lines_that_the_prompts_share_are_dropped():
    prompts = [f"Which topic?\nOptions: a, b\nText: {word}\nAnswer:" for word in ("x", "y", "z")]
    assert without_template(prompts) == ["Text: x", "Text: y", "Text: z"]
    texts, ids = prompt_views(prompts)
    assert texts == [*prompts, "Text: x", "Text: y", "Text: z"]
    assert ids == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("prompts", [["only one\nprompt"], ["same", "same"], ["a b", "c d", "e f"]])
def test_a_prompt_is_never_left_empty_and_equal_views_are_one(prompts):
    assert without_template(prompts) == prompts
    assert prompt_views(prompts) == (prompts, list(range(len(prompts))))


# features


def reference(model, ids, mask, layer):
    """The mean over real tokens of unit-size activations, from the full pass."""
    trunk = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    with torch.no_grad():
        hidden = trunk(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer].float()
    hidden = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    return torch.stack([row[keep.bool()].mean(0) for row, keep in zip(hidden, mask, strict=True)])


def ragged(side: str, lengths=(7, 3, 5), width: int = 9):
    generator = torch.Generator().manual_seed(3)
    ids = torch.full((len(lengths), width), 0)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(3, 97, (length,), generator=generator)
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_base_models_mean_activations(tiny_model, family):
    model = tiny_model(family)
    ids, mask = ragged("right")
    features = prompt_features(model, ids, mask)
    assert features.shape == (3, 2, 32)
    assert features.dtype == torch.float32
    for vector in (0, 1):  # the embeddings, and one of two blocks
        torch.testing.assert_close(features[:, vector], reference(model, ids, mask, vector), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer_features(model, ids, mask, [1, 0]), features.flip(1))
    assert not torch.allclose(features[:, 0], features[:, 1], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_do_not_depend_on_padding_or_on_the_other_rows(tiny_model, family):
    model = tiny_model(family)
    right = prompt_features(model, *ragged("right"), layer=2)
    left = prompt_features(model, *ragged("left", width=12), layer=2)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)
    ids, mask = ragged("left")
    alone = torch.cat([prompt_features(model, ids[row : row + 1], mask[row : row + 1], layer=2) for row in (2, 0, 1)])
    torch.testing.assert_close(alone[[1, 2, 0]], right, rtol=1e-4, atol=1e-5)
    rows = [ids[row][mask[row].bool()].tolist() for row in range(3)]
    torch.testing.assert_close(features_of_encoded(model, rows, 2, batch_size=2), right, rtol=1e-4, atol=1e-5)


def test_padding_in_the_mean_would_be_seen(tiny_model):
    # the mistake: a mean over all positions
    model = tiny_model("llama")
    ids, mask = ragged("right")
    wrong = prompt_features(model, ids, torch.ones_like(mask))
    assert not torch.allclose(wrong[1], prompt_features(model, ids, mask)[1], atol=1e-3)


def test_one_huge_token_does_not_drown_the_prompt(tiny_model):
    model = tiny_model("llama")
    ids, mask = ragged("right", lengths=(5, 5), width=5)
    ids[:, 0] = 7
    before = prompt_features(model, ids, mask, 0)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] *= 1000
    after = prompt_features(model, ids, mask, 0)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_later_blocks_are_not_run_and_hooks_go_away(tiny_model):
    model = tiny_model("llama")
    ran = []
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    prompt_features(model, *ragged("right"), layer=1)
    assert ran == [0]
    prompt_features(model, *ragged("right"), layer=0)
    assert ran == [0]
    model(input_ids=torch.tensor([[5, 6]]))
    assert ran == [0, 0, 1]


def test_dropout_is_off_and_the_mode_is_left_as_it_was(tiny_model):
    model = tiny_model("bert").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    first = prompt_features(model, *ragged("right"))
    assert model.training and model.base_model.training
    assert torch.equal(first, prompt_features(model.eval(), *ragged("right")))
    assert not first.requires_grad


def test_a_submodule_in_evaluation_mode_stays_there(tiny_model):
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    prompt_features(model, *ragged("right"))
    assert model.model.layers[1].training
    assert not model.model.layers[0].training


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT
def test_features_are_the_base_models_when_adapters_are_off(tiny_model):
    peft = pytest.importorskip("peft")
    base = prompt_features(tiny_model("llama"), *ragged("right"))
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config)
    with model.disable_adapter():
        assert torch.equal(prompt_features(model, *ragged("right")), base)
    # the mistake: adapters left on
    assert not torch.allclose(prompt_features(model, *ragged("right")), base, atol=1e-4)


def test_bfloat16_gives_float32_features(tiny_model):
    exact = prompt_features(tiny_model("qwen2"), *ragged("right"))
    rounded = prompt_features(tiny_model("qwen2").to(torch.bfloat16), *ragged("left"))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.05)


def test_what_features_cannot_be_taken_of_is_named(tiny_model):
    model = tiny_model("llama")
    ids, mask = ragged("right")
    with pytest.raises(ConfigError, match="give 0 to 2"):
        prompt_features(model, ids, mask, 3)
    with pytest.raises(ConfigError, match="without tokens"):
        prompt_features(model, ids, mask * torch.tensor([[1], [0], [1]]))
    with pytest.raises(ConfigError, match="batch, tokens"):
        prompt_features(model, ids, mask[:, :-1])
    with pytest.raises(ConfigError, match="no prompts"):
        features_of_encoded(model, [])
    with pytest.raises(ModelError, match="list of blocks") as caught:
        prompt_features(torch.nn.Linear(2, 2), ids, mask)
    assert caught.value.code == "no_blocks"


# random features


def test_random_features_come_from_the_seed_alone():
    x = np.random.default_rng(0).standard_normal((4, 2, 6))
    assert np.array_equal(RandomFeatures(2, 6, 30, 1)(x), RandomFeatures(2, 6, 30, 1)(x))
    assert not np.allclose(RandomFeatures(2, 6, 30, 1)(x), RandomFeatures(2, 6, 30, 2)(x))
    # golden: stored statistics are worth nothing if the map ever changes
    golden = [[0.906041, -0.194431], [0.017590, 0.904743], [-0.422825, -0.378995]]
    assert np.allclose(RandomFeatures(1, 3, 3, 7).linear, golden, atol=1e-6)
    assert (RandomFeatures(2, 6, 30, 1)(np.zeros((1, 2, 6))) == [0] * 29 + [1]).all()
    # one vector may be far larger than the other
    scaled = x * np.array([1e6, 1.0])[:, None]
    assert np.allclose(RandomFeatures(2, 6, 30, 1)(scaled), RandomFeatures(2, 6, 30, 1)(x))


@pytest.mark.parametrize(("number", "num_linear"), [(9, 8), (13, 12), (20, 12)])
def test_what_room_is_left_by_the_projection_is_filled(number, num_linear):
    lift = RandomFeatures(2, 6, number, 0)
    assert lift.linear.shape == (12, num_linear)
    assert np.allclose(lift.linear.T @ lift.linear, np.eye(num_linear))
    features = lift(np.random.default_rng(0).standard_normal((50, 2, 6)))
    assert features.shape == (50, number)
    assert (features[:, num_linear:] >= 0).all()
    assert np.linalg.matrix_rank(features) == number


# identification


@pytest.mark.parametrize("kind", ["ridge", "cosine"])
def test_tasks_are_told_apart_and_strangers_are_unknown(kind):
    known = clusters(4, rows=80, seed=1, spread=0.15)
    identifier = fitted([features[:40] for features in known[:3]], dataclasses.replace(SMALL, kind=kind))
    for task_id in range(3):
        answer = identifier.predict(known[task_id][40:])
        assert answer.tasks == (0, 1, 2)
        assert (answer.task_ids == task_id).all()
        assert np.allclose(answer.probabilities.sum(1), 1)
        assert (answer.probabilities.argmax(1) == task_id).all()
        assert answer.unknown.mean() <= 0.05
    assert identifier.predict(known[3]).unknown.mean() >= 0.9


def test_prompt_loss_takes_the_task_that_finds_the_prompt_likeliest():
    identifier = TaskIdentifier(IdentifierConfig(kind="prompt_loss"), 1)
    random = np.random.default_rng(0)
    for task_id in (4, 2):
        identifier.add_task(task_id, 1.0 + 0.1 * random.random((30, 1)))
    answer = identifier.predict([[1.05, 3.0], [3.0, 1.05], [9.0, 9.5]])
    assert answer.tasks == (2, 4)
    assert answer.task_ids.tolist() == [2, 4, 2]
    assert answer.unknown.tolist() == [False, False, True]


def test_a_tie_goes_to_the_lower_id():
    identifier = TaskIdentifier(IdentifierConfig(kind="prompt_loss"), 1)
    for task_id in (9, 3):
        identifier.add_task(task_id, [[1.0], [1.1]])
    assert identifier.predict([[2.0, 2.0]]).task_ids.tolist() == [3]


def test_each_row_is_judged_alone():
    tasks = clusters(3, seed=2)
    identifier = fitted(tasks)
    mixed = np.concatenate(tasks)[np.random.default_rng(0).permutation(120)]
    together = identifier.predict(mixed)
    for row in range(0, 120, 17):
        alone = identifier.predict(mixed[row : row + 1])
        assert alone.task_ids[0] == together.task_ids[row]
        assert np.allclose(alone.probabilities[0], together.probabilities[row], rtol=1e-9, atol=1e-12)
        assert np.allclose(alone.novelty[0], together.novelty[row], rtol=1e-9)


def test_the_threshold_decides_what_is_unknown():
    tasks = clusters(3, rows=80, seed=3)
    known = [task[:40] for task in tasks[:2]]
    never = fitted(known, dataclasses.replace(SMALL, threshold=float("inf")))
    assert not never.predict(tasks[2]).unknown.any()
    always = fitted(known, dataclasses.replace(SMALL, threshold=0.0))
    answer = always.predict(tasks[0][40:])
    assert np.array_equal(answer.unknown, answer.novelty > 0)
    assert 0.1 < answer.unknown.mean() < 0.9


def test_novelty_of_own_prompts_is_judged_without_them():
    # the mistake: calibrating on prompts that are in the Gram calls every fresh prompt of the task novel
    random = np.random.default_rng(5)
    features = random.standard_normal((260, 2, 12))
    identifier = TaskIdentifier(SMALL, 12)
    identifier.add_task(0, features[:60])
    fresh = identifier.predict(features[60:]).novelty
    assert abs(fresh.mean()) < 0.25
    assert 0.75 < fresh.std() < 1.3


@pytest.mark.parametrize("kind", ["ridge", "cosine"])
def test_a_prompts_other_views_are_left_out_with_it(kind):
    random = np.random.default_rng(6)
    features = random.standard_normal((30, 2, 12)) + 2
    config = IdentifierConfig(kind=kind, num_features=24, ridge=0.0)
    plain, doubled, careless = (TaskIdentifier(config, 12) for _ in range(3))
    plain.add_task(0, features)
    doubled.add_task(0, np.concatenate([features] * 2), [*range(30)] * 2)
    careless.add_task(0, np.concatenate([features] * 2))
    usual = [identifier.task_state(0)["usual"] for identifier in (plain, doubled, careless)]
    assert np.allclose(usual[0], usual[1], rtol=0.02)
    assert abs(usual[2][0] - usual[0][0]) > (0.1 if kind == "ridge" else 0.01)


def test_one_prompt_is_enough_for_a_task():
    for kind in ("ridge", "cosine"):
        identifier = TaskIdentifier(dataclasses.replace(SMALL, kind=kind), 3)
        identifier.add_task(0, [[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
        identifier.add_task(1, np.zeros((1, 2, 3)))
        answer = identifier.predict([[[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
        assert answer.task_ids.tolist() == [0]
        assert not answer.unknown.any()


# errors and stored state


def test_misuse_is_a_typed_error():
    identifier = TaskIdentifier(SMALL, 3)
    with pytest.raises(RegistryError, match="knows no task"):
        identifier.predict(np.zeros((1, 2, 3)))
    identifier.add_task(1, np.ones((3, 2, 3)))
    with pytest.raises(RegistryError, match="already"):
        identifier.add_task(1, np.ones((3, 2, 3)))
    with pytest.raises(RegistryError, match="already"):
        identifier.load_task_state(1, identifier.task_state(1))
    with pytest.raises(RegistryError, match="does not know task 2: it knows 1"):
        identifier.remove_task(2)
    for shape in ((1, 3), (1, 2, 4), (1, 3, 3), (2, 3)):
        with pytest.raises(ConfigError, match=r"give \(prompts, 2, 3\)"):
            identifier.predict(np.zeros(shape))
    with pytest.raises(ConfigError, match="at least one prompt"):
        identifier.add_task(2, np.zeros((0, 2, 3)))
    with pytest.raises(ConfigError, match="prompt_ids"):
        identifier.add_task(2, np.ones((3, 2, 3)), [0, 1])
    with pytest.raises(ConfigError, match="task id"):
        identifier.add_task(-1, np.ones((3, 2, 3)))
    with pytest.raises(ConfigError, match="feature_dim"):
        TaskIdentifier(SMALL, 0)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="row 1 are not finite"):
            identifier.predict([[[0.0] * 3, [0.0] * 3], [[0.0, bad, 0.0], [0.0] * 3]])
        with pytest.raises(ModelError, match="not finite"):
            identifier.add_task(2, torch.full((1, 2, 3), bad))
    assert identifier.task_ids == (1,)


def test_torch_features_of_any_dtype_are_taken():
    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype(np.float32)
    states = []
    for features in (x, torch.tensor(x), torch.tensor(x).requires_grad_()):
        identifier = TaskIdentifier(SMALL, 3)
        identifier.add_task(0, features)
        states.append(identifier.task_state(0))
    assert all(np.array_equal(states[0][name], state[name]) for state in states for name in state)
    TaskIdentifier(SMALL, 3).add_task(0, torch.tensor(x).bfloat16())


@pytest.mark.parametrize("kind", ["ridge", "cosine", "prompt_loss"])
def test_a_state_is_the_same_after_it_was_stored(kind, tmp_path):
    from safetensors.numpy import load_file, save_file

    config = dataclasses.replace(SMALL, kind=kind)
    tasks = clusters(3, seed=4)
    if kind == "prompt_loss":
        tasks = [np.abs(task[:, 0, :1]) for task in tasks]
    identifier = fitted(tasks, config)
    loaded = TaskIdentifier(config, tasks[0].shape[-1])
    for task_id in (2, 0, 1):
        save_file(identifier.task_state(task_id), tmp_path / f"{task_id}.safetensors")
        loaded.load_task_state(task_id, load_file(tmp_path / f"{task_id}.safetensors"))
    queries = np.concatenate([np.tile(task, (1, 3)) if kind == "prompt_loss" else task for task in tasks])
    before, after = identifier.predict(queries), loaded.predict(queries)
    assert np.array_equal(before.probabilities, after.probabilities)
    assert np.array_equal(before.novelty, after.novelty)


def test_a_state_given_out_cannot_change_the_identifier():
    identifier = fitted(clusters(2))
    identifier.task_state(0)["mean"][:] = 0
    identifier.task_state(0)["count"][:] = 0
    answer = identifier.predict(np.ones((1, 2, 12)))
    assert np.array_equal(answer.probabilities, fitted(clusters(2)).predict(np.ones((1, 2, 12))).probabilities)
    given = identifier.task_state(1)
    other = TaskIdentifier(SMALL, 12)
    other.load_task_state(1, given)
    given["mean"][:] = 0
    assert other.task_state(1)["mean"].any()


def test_a_task_learned_anew_is_not_judged_by_what_it_was():
    old, new, other = clusters(3, rows=60)
    identifier = fitted([old[:40], other])
    identifier.predict(old)
    identifier.remove_task(0)
    identifier.add_task(0, new[:40])
    assert np.array_equal(identifier.predict(new).novelty, fitted([new[:40], other]).predict(new).novelty)


def test_more_tasks_than_are_kept_prepared_answer_the_same(monkeypatch):
    tasks = clusters(5)
    whole = fitted(tasks).predict(np.concatenate(tasks))
    monkeypatch.setattr("moses.stream.identify.identifier.MAX_PREPARED", 2)
    few = fitted(tasks)
    assert np.array_equal(few.predict(np.concatenate(tasks)).novelty, whole.novelty)
    assert len(few._prepared) == 2


def damage(name):
    def change(state):
        if name == "missing":
            del state["correlation"]
        elif name == "extra":
            state["more"] = np.zeros(1)
        elif name == "shape":
            state["correlation"] = state["correlation"][:-1]
        elif name == "dtype":
            state["spread"] = state["spread"].astype(np.float32)
        elif name == "nan":
            state["mean"][3] = np.nan
        elif name == "count":
            state["count"][0] = 0
        elif name == "spread":
            state["usual"][1] = 0
        elif name == "huge spread":
            state["usual"][1] = 1e300
        elif name == "huge":
            state["mean"][3] = 1e300
        elif name == "negative":
            state["correlation"][:] = -32767
        return state

    return change


@pytest.mark.parametrize(
    "name", ["missing", "extra", "shape", "dtype", "nan", "count", "spread", "huge spread", "huge", "negative"]
)
def test_a_damaged_state_is_refused(name):
    state = damage(name)(fitted(clusters(1)).task_state(0))
    other = TaskIdentifier(SMALL, 12)
    with pytest.raises(FormatError, match=r"identifier of task 0: .*damaged") as caught:
        other.load_task_state(0, state)
    assert caught.value.code == "identifier_state"
    assert other.task_ids == ()


@pytest.mark.parametrize("change", [{"seed": 1}, {"layer": 3}])
def test_a_state_of_other_settings_is_refused(change):
    state = fitted(clusters(1)).task_state(0)
    with pytest.raises(FormatError, match="own settings") as caught:
        TaskIdentifier(dataclasses.replace(SMALL, **change), 12).load_task_state(0, state)
    assert caught.value.code == "identifier_settings"
