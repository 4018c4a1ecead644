"""What surgery writes loads with plain transformers and computes what plain PyTorch makes of the original's tensors."""

from __future__ import annotations

import json

import pytest
import torch

from moses import surgery
from moses.errors import SurgeryError
from moses.surgery import Writing

from .conftest import COUNT_KEY, LAYOUTS, TYPES, load, logits, make_config, make_model, read_config, rebuilt, save

GROUPED = ("deepseek_v2", "deepseek_v3")
BIASED = ("deepseek_v3", "gpt_oss")
both = pytest.mark.parametrize(("kind", "layout"), LAYOUTS)


@pytest.mark.parametrize("shards", [1, 4])
@both
def test_prune(kind, layout, shards, models, checkpoints, tmp_path):
    kept = [0, 2] if kind in GROUPED else [3, 1]
    source = checkpoints(kind, layout, shards)
    if kind == "deepseek_v3":
        with pytest.raises(SurgeryError, match="at least 2 of each") as caught:
            surgery.prune(source, tmp_path / "out", keep=kept)
        assert caught.value.code == "groups_misfit"
        kept = [2, 3, 0, 1]
    done = surgery.prune(source, tmp_path / "out", keep=kept, top_k=1)
    assert done.path == tmp_path / "out"
    found = load(done.path)
    assert getattr(found.config, COUNT_KEY.get(kind, "num_experts")) == len(kept)
    assert torch.equal(logits(found), logits(rebuilt([models(kind)], kept, kind, top_k=1)))
    verdict = surgery.verify(done.path, source)
    assert verdict.ok, verdict.problems
    assert verdict.experts == len(kept) * (1 if kind in GROUPED else 2)
    assert len(list(done.path.glob("*.safetensors"))) <= len(list(source.glob("*.safetensors")))
    assert (done.path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (done.path / "generation_config.json").exists()


@both
def test_grow(kind, layout, models, checkpoints, tmp_path):
    source = checkpoints(kind, layout, 3)
    done = surgery.grow(source, tmp_path / "out", add=2, sources=[1, 2], new_rows="copy")
    slots = [0, 1, 1, 2, 3, 2] if kind in GROUPED else [0, 1, 2, 3, 1, 2]
    assert torch.equal(logits(load(done.path)), logits(rebuilt([models(kind)], slots, kind)))
    assert surgery.verify(done.path, source).ok


@both
def test_growth_preserves_the_function_where_the_type_allows_it(kind, layout, models, checkpoints, tmp_path):
    done = surgery.grow(checkpoints(kind, layout, 3), tmp_path / "out", add=2, noise=0.1, seed=3)
    before, after = logits(models(kind)), logits(load(done.path))
    if kind in BIASED:
        assert torch.equal(before, after)
        assert any("stay, bit for bit" in note for note in done.description["notes"])
        assert surgery.verify(done.path, checkpoints(kind, layout, 3)).ok
    else:
        assert not torch.equal(before, after)
        assert any("outputs change" in note for note in done.description["notes"])
        with pytest.raises(SurgeryError, match="no selection bias"):
            surgery.grow(checkpoints(kind, layout, 3), tmp_path / "other", add=2, new_rows="masked")


@both
def test_merge(kind, layout, models, checkpoints, tmp_path):
    parts = [checkpoints(kind, layout, 2), checkpoints(kind, layout, 3, seed=1)]
    done = surgery.merge(parts, tmp_path / "out")
    slots = [0, 1, 4, 5, 2, 3, 6, 7] if kind in GROUPED else range(8)
    expected = rebuilt([models(kind), models(kind, 1)], slots, kind)
    assert torch.equal(logits(load(done.path)), logits(expected))
    assert surgery.verify(done.path, parts).ok


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "gpt_oss"])
def test_convert_there_and_back(kind, models, checkpoints, tmp_path):
    source = checkpoints(kind, "per-expert", 3)
    fused = surgery.convert(source, tmp_path / "fused", layout="fused")
    again = surgery.convert(fused.path, tmp_path / "again", layout="per-expert")
    for folder in (fused.path, again.path):
        assert torch.equal(logits(load(folder)), logits(models(kind)))
        assert surgery.verify(folder, source).ok
    layers = surgery.open_checkpoint(fused.path).document["layers"]
    assert {layer["layout"] for layer in layers} == {"fused"}
    names = {path: names_of(path) for path in (source, again.path)}
    assert names[source] == names[again.path]


def names_of(folder):
    from safetensors import safe_open

    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_extract_to_dense(kind, layout, models, checkpoints, tmp_path):
    source = checkpoints(kind, layout, 2)
    done = surgery.extract(source, tmp_path / "dense", experts=[2])
    assert read_config(done.path)["model_type"] == {"mixtral": "mistral", "qwen3_moe": "qwen3"}[kind]
    mixture = surgery.extract(source, tmp_path / "mixture", experts=[2], dense=False)
    expected = rebuilt([models(kind)], [2], kind, top_k=1)
    assert torch.equal(logits(load(mixture.path)), logits(expected))
    # one expert's weight is 1 whatever its logit; the dense class computes in another order of products
    torch.testing.assert_close(logits(load(done.path)), logits(expected), rtol=1e-5, atol=1e-6)
    assert surgery.verify(done.path, source).ok


def test_extract_by_layer_is_a_smaller_mixture(models, checkpoints, tmp_path):
    experts = {"model.layers.0": [0, 3], "model.layers.1": [2, 1]}
    done = surgery.extract(checkpoints("olmoe", "per-expert", 3), tmp_path / "out", experts=experts)
    state = models("olmoe").state_dict()
    for name, tensor in load(done.path).state_dict().items():
        kept = next((numbers for layer, numbers in experts.items() if name.startswith(layer + ".mlp.")), None)
        assert torch.equal(tensor, state[name] if kept is None else state[name][kept])


def test_extract_of_another_type_stays_a_mixture(checkpoints, tmp_path):
    done = surgery.extract(checkpoints("olmoe"), tmp_path / "out", experts=[2])
    assert read_config(done.path)["model_type"] == "olmoe"
    assert load(done.path).config.num_experts_per_tok == 1
    with pytest.raises(SurgeryError, match="no dense model type"):
        surgery.extract(checkpoints("olmoe"), tmp_path / "dense", experts=[2], dense=True)


def test_experts_that_no_token_uses_change_nothing(tmp_path):
    model = make_model("qwen3_moe", config=make_config("qwen3_moe", num_experts=12))
    used: dict[str, set[int]] = {}

    def watch(name):
        def hook(module, inputs, output):
            scores = torch.nn.functional.linear(inputs[0].reshape(-1, 16), module.weight)
            used.setdefault(name, set()).update(scores.topk(2).indices.flatten().tolist())

        return hook

    handles = [
        m.register_forward_hook(watch(n.removesuffix(".mlp.gate")))
        for n, m in model.named_modules()
        if n.endswith("mlp.gate")
    ]
    ids = torch.tensor([[5, 9]])
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    size = max(map(len, used.values()))
    keep = {layer: sorted([*numbers, *(set(range(12)) - numbers)][:size]) for layer, numbers in used.items()}
    source = save(model, tmp_path / "source")
    done = surgery.prune(source, tmp_path / "out", keep=keep)
    with torch.inference_mode():
        after = load(done.path)(input_ids=ids).logits
    assert size < 12
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_both_config_keys_of_qwen3_moe(checkpoints, tmp_path):
    config = read_config(surgery.prune(checkpoints("qwen3_moe"), tmp_path / "out", keep=[1, 2, 3]).path)
    assert (config["num_experts"], config["num_local_experts"]) == (3, 3)


def test_pruned_generates(checkpoints, tmp_path):
    model = load(surgery.prune(checkpoints("mixtral"), tmp_path / "out", keep=[1, 2]).path)
    assert model.generate(torch.tensor([[1, 5]]), max_new_tokens=3, do_sample=False).shape[1] <= 5


def test_usage_and_magnitude(models, checkpoints, tmp_path):
    usage = {"model.layers.0": [5, 1, 5, 9], "model.layers.1": [0, 0, 0, 0]}
    done = surgery.prune(checkpoints("olmoe"), tmp_path / "out", usage=usage, to=2)
    assert [part.slots[n].sources[0] for part in done.plan.layers for n in (0, 1)] == [0, 3, 0, 1]
    by_norm = surgery.prune(checkpoints("olmoe"), usage="magnitude", to=2, writing=Writing(dry_run=True))
    state = models("olmoe").state_dict()
    for part in by_norm.plan.layers:
        experts = [state[f"{part.layer}.mlp.experts.{name}"].double() for name in ("gate_up_proj", "down_proj")]
        norms = sum(tensor.flatten(1).square().sum(1) for tensor in experts)
        assert [slot.sources[0] for slot in part.slots] == sorted(norms.topk(2).indices.tolist())


def test_top_k_above_the_experts_left(checkpoints, tmp_path):
    with pytest.raises(SurgeryError, match="a token uses 2") as caught:
        surgery.prune(checkpoints("mixtral"), tmp_path / "out", keep=[1])
    assert caught.value.code == "top_k_too_large"
    assert list(tmp_path.iterdir()) == []


def test_uneven_is_refused_unless_asked_for(checkpoints, tmp_path):
    keep = {"model.layers.0": [0, 1], "model.layers.1": [0, 1, 2]}
    with pytest.raises(SurgeryError) as caught:
        surgery.prune(checkpoints("mixtral"), tmp_path / "out", keep=keep)
    assert caught.value.code == "uneven_experts"
    done = surgery.prune(checkpoints("mixtral"), tmp_path / "out", keep=keep, writing=Writing(uneven=True))
    assert surgery.open_checkpoint(done.path).facts.num_experts == {"model.layers.0": 2, "model.layers.1": 3}


def test_tied_weights_and_odd_tensors_are_carried(tmp_path):
    model = make_model("mixtral", config=make_config("mixtral", tie_word_embeddings=True))
    source = save(model, tmp_path / "source")
    done = surgery.prune(source, tmp_path / "out", keep=[1, 2])
    found = load(done.path)
    assert found.lm_head.weight.data_ptr() == found.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(found), logits(rebuilt([model], [1, 2], "mixtral")))


def test_noise_is_relative_and_averages_are_averages(models, checkpoints, tmp_path):
    plan = surgery.SurgeryPlan(
        tuple(
            surgery.LayerSurgery(
                layer,
                4,
                (
                    surgery.Slot((0,)),
                    surgery.Slot((1, 2), (0.25, 0.75)),
                    surgery.Slot((3,), new=True, noise=0.5),
                    surgery.Slot((), new=True),
                ),
            )
            for layer in ("model.layers.0", "model.layers.1")
        ),
        seed=7,
    )
    outs = [
        surgery.apply(checkpoints("qwen3_moe", layout, 2), plan, tmp_path / layout)
        for layout in ("per-expert", "fused")
    ]
    states = [load(out.path).state_dict() for out in outs]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items()), "layouts differ"
    before = models("qwen3_moe").state_dict()
    for name, tensor in states[0].items():
        if ".mlp.gate." in name:
            assert torch.equal(tensor[2], before[name][3])
            torch.testing.assert_close(tensor[1], 0.25 * before[name][1] + 0.75 * before[name][2])
        if ".experts." in name:
            torch.testing.assert_close(tensor[1], 0.25 * before[name][1] + 0.75 * before[name][2])
            noise = (tensor[2] - before[name][3]).std() / before[name][3].std()
            assert 0.4 < noise < 0.6
            assert 0.015 < tensor[3].std() < 0.025, "fresh weights have the config's initializer_range"


def test_the_record_is_the_plan(checkpoints, tmp_path):
    done = surgery.prune(checkpoints("mixtral"), tmp_path / "out", keep=[1, 2], writing=Writing(hash=True))
    record = json.loads((done.path / "moses_surgery.json").read_text())
    assert surgery.SurgeryPlan.from_json(json.dumps(record["plan"])) == done.plan
    from safetensors import safe_open

    import moses._core as core

    with safe_open(done.path / "model.safetensors", "np") as file:
        for name, digest in record["blake3"].items():
            assert core.blake3_hex(file.get_tensor(name).tobytes()) == digest
        assert set(record["blake3"]) == set(file.keys())
