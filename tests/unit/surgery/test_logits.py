"""What surgery writes loads with plain transformers and computes what plain PyTorch makes of the original's tensors."""

from __future__ import annotations

import json
import math

import pytest
import torch

from moses import surgery
from moses.cli import main
from moses.errors import FormatError, SurgeryError
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


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of no width
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize(
    ("kind", "changes", "dense"),
    [
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "qwen2"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0, "qkv_bias": False}, "llama"),
        ("flex_olmo", {}, "olmo2"),
    ],
)
def test_extract_to_dense_where_the_config_allows_it(kind, changes, dense, layout, tmp_path):
    model = make_model(kind, config=make_config(kind, **changes))
    source = save(model, tmp_path / "source", layout, 2)
    done = surgery.extract(source, tmp_path / "dense", experts=[2])
    assert read_config(done.path)["model_type"] == dense
    # one of its experts for every token, by its own class
    mixture = surgery.extract(source, tmp_path / "mixture", experts=[2], dense=False)
    torch.testing.assert_close(logits(load(done.path)), logits(load(mixture.path)), rtol=1e-5, atol=1e-6)
    assert surgery.verify(done.path, source).ok


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of no width
@pytest.mark.parametrize(
    "changes",
    [
        {"shared_expert_intermediate_size": 4},
        {"shared_expert_intermediate_size": 0, "qkv_bias": False, "use_sliding_window": True, "sliding_window": 8},
    ],
)
def test_extract_stays_a_mixture_where_the_config_allows_no_dense_class(changes, tmp_path):
    source = save(make_model("qwen2_moe", config=make_config("qwen2_moe", **changes)), tmp_path / "source")
    done = surgery.extract(source, tmp_path / "out", experts=[2])
    assert read_config(done.path)["model_type"] == "qwen2_moe"
    load(done.path)


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


@pytest.mark.parametrize("shards", [1, 4])
@both
def test_growth_in_place(kind, layout, shards, models, copied):
    source = copied(kind, layout, shards)
    before = {path.name: path.stat().st_ino for path in source.glob("*.safetensors")}
    done = surgery.grow(source, add=2, sources=[1, 2], new_rows="copy", writing=Writing(in_place=True))
    assert done.path == source
    slots = [0, 1, 1, 2, 3, 2] if kind in GROUPED else [0, 1, 2, 3, 1, 2]
    expected = rebuilt([models(kind)], slots, kind)
    assert torch.equal(logits(load(source)), logits(expected))
    again = surgery.grow(
        source, add=2, sources=[4, 1] if kind in GROUPED else [4, 5], new_rows="copy", writing=Writing(in_place=True)
    )
    picked = [n for n, slot in enumerate(again.plan.layers[0].slots)]
    second = [slot.sources[0] for slot in again.plan.layers[0].slots]
    assert len(picked) == 8
    assert torch.equal(logits(load(source)), logits(rebuilt([expected], second, kind)))
    assert all("model" in name for name in before)
    assert surgery.verify(source, source, surgery.SurgeryPlan(())).ok


def test_link_shares_what_does_not_change(checkpoints, tmp_path):
    source = checkpoints("qwen2_moe", "per-expert", 6)
    done = surgery.prune(source, tmp_path / "out", keep={"model.layers.1": [0, 1, 2, 3]}, writing=Writing(link=True))
    linked = [
        path for path in done.path.glob("*.safetensors") if path.stat().st_ino == (source / path.name).stat().st_ino
    ]
    assert len(linked) == done.description["unchanged_shards"] == len(done.description["shards"])
    assert done.description["bytes_written"] == 0
    half = surgery.prune(source, tmp_path / "half", keep=[0, 1, 2], writing=Writing(link=True))
    assert surgery.verify(half.path, source).ok


def test_a_dry_run_writes_nothing_and_says_what_would_be(checkpoints, tmp_path):
    source = checkpoints("qwen3_moe", "per-expert", 3)
    planned = surgery.prune(source, keep=[0, 1], writing=Writing(dry_run=True)).description
    assert planned["tensors"] == {"cut": 2, "dropped": 12, "kept": 31, "made": 0, "renamed": 0}
    done = surgery.prune(source, tmp_path / "out", keep=[0, 1])
    assert planned == done.description
    assert planned["bytes_written"] == sum(path.stat().st_size for path in done.path.glob("*.safetensors"))
    unchanged = {shard["name"] for shard in planned["shards"] if shard["unchanged"]}
    written = [path.read_bytes()[:8] for path in done.path.glob("*.safetensors") if path.name not in unchanged]
    headers = sum(8 + int.from_bytes(length, "little") for length in written)
    assert planned["bytes_read"] == planned["bytes_written"] - headers


def raw_checkpoint(folder, config, tensors):
    """Tensors of bytes under any name, dtype and shape, in one file."""
    folder.mkdir()
    header, data = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def raw_tensors(folder):
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    return {
        n: (e["dtype"], e["shape"], raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for n, e in header.items()
    }


def mxfp4(folder, experts=4):
    """GptOss as published: blocks and scales of four-bit numbers, by the shapes of its checkpoints."""
    generator = torch.Generator().manual_seed(0)

    def tensor(dtype, *shape):
        width = {"U8": 1, "BF16": 2}[dtype]
        count = width * math.prod(shape)
        return dtype, list(shape), bytes(torch.randint(256, (count,), generator=generator).tolist())

    block = "model.layers.0.mlp"
    tensors = {
        f"{block}.experts.gate_up_proj_blocks": tensor("U8", experts, 8, 2, 16),
        f"{block}.experts.gate_up_proj_scales": tensor("U8", experts, 8, 2),
        f"{block}.experts.gate_up_proj_bias": tensor("BF16", experts, 8),
        f"{block}.experts.down_proj_blocks": tensor("U8", experts, 64, 1, 16),
        f"{block}.experts.down_proj_scales": tensor("U8", experts, 64, 1),
        f"{block}.experts.down_proj_bias": tensor("BF16", experts, 64),
        f"{block}.router.weight": tensor("BF16", experts, 64),
        f"{block}.router.bias": tensor("BF16", experts),
    }
    config = {"model_type": "gpt_oss", "num_local_experts": experts, "num_experts_per_tok": 1, "experts_per_token": 1}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}
    return raw_checkpoint(folder, config, tensors)


def test_mxfp4_is_cut_in_whole_experts_and_never_computed_with(tmp_path):
    source = mxfp4(tmp_path / "source")
    done = surgery.prune(source, tmp_path / "out", keep=[2, 0])
    before, after = raw_tensors(source), raw_tensors(done.path)
    assert set(before) == set(after)
    for name, (dtype, shape, content) in before.items():
        size = len(content) // 4
        assert after[name] == (dtype, [2, *shape[1:]], content[2 * size : 3 * size] + content[:size])
    assert surgery.verify(done.path, source).ok
    config = read_config(done.path)
    assert (config["num_local_experts"], config["quantization_config"]["quant_method"]) == (2, "mxfp4")
    grown = surgery.grow(source, tmp_path / "grown", add=1)
    assert (
        raw_tensors(grown.path)["model.layers.0.mlp.router.bias"][2][-2:]
        == torch.tensor([-1e4]).bfloat16().view(torch.uint8).numpy().tobytes()
    )
    for refused in (
        lambda: surgery.grow(source, tmp_path / "x", add=1, noise=0.1),
        lambda: surgery.convert(source, tmp_path / "x", layout="fused"),
        lambda: surgery.prune(source, usage="magnitude", to=2, writing=Writing(dry_run=True)),
    ):
        with pytest.raises(SurgeryError) as caught:
            refused()
        assert caught.value.code == "surgery_unsupported"


def fp8(folder, quantised):
    """Two experts with a scale beside each matrix, as DeepSeek's published checkpoints have them."""
    block = "model.layers.0.mlp"
    tensors = {
        f"{block}.gate.weight": ("F32", [2, 2], bytes(16)),
        f"{block}.gate.e_score_correction_bias": ("F32", [2], bytes(8)),
    }
    for expert in (0, 1):
        for number, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            tensors[f"{block}.experts.{expert}.{name}.weight"] = ("F8_E4M3", [2, 2], bytes([expert * 10 + number] * 4))
            tensors[f"{block}.experts.{expert}.{name}.weight_scale_inv"] = (
                "F32",
                [1, 1],
                bytes([expert * 10 + number] * 4),
            )
    config = {
        "model_type": "deepseek_v3",
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    return raw_checkpoint(folder, config | {"quantization_config": quantised}, tensors)


def test_scales_move_with_their_experts(tmp_path):
    source = fp8(tmp_path / "source", {"quant_method": "fp8"})
    done = surgery.prune(source, tmp_path / "out", keep=[1])
    after = raw_tensors(done.path)
    assert after["model.layers.0.mlp.experts.0.up_proj.weight_scale_inv"] == ("F32", [1, 1], bytes([11] * 4))
    assert after["model.layers.0.mlp.experts.0.up_proj.weight"] == ("F8_E4M3", [2, 2], bytes([11] * 4))
    assert any("weight_scale_inv" in note for note in done.description["notes"])
    for refused in (
        lambda: surgery.convert(source, tmp_path / "x", layout="fused"),
        lambda: surgery.grow(source, tmp_path / "x", add=1, noise=0.1),
    ):
        with pytest.raises(SurgeryError) as caught:
            refused()
        assert caught.value.code == "surgery_unsupported"


def test_a_quantisation_that_names_single_experts_is_refused(tmp_path):
    source = fp8(tmp_path / "source", {"ignored_layers": ["model.layers.0.mlp.experts.0.up_proj"]})
    with pytest.raises(SurgeryError, match="names single experts"):
        surgery.prune(source, tmp_path / "out", keep=[1])
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_a_checkpoint(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(SurgeryError) as caught:
        surgery.prune(tmp_path, tmp_path / "out", keep=[1])
    assert caught.value.code == "is_a_run"


def test_the_shards_that_transformers_reads_last_win(copied):
    """What growth in place relies on: of two shards with one tensor, the later name's is loaded."""
    source = copied("olmoe", "per-expert", 3)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.mlp.gate.weight"
    value = torch.full_like(load_file(source / index["weight_map"][name])[name], 0.25)
    save_file({name: value}, source / "model.z-moses-00001.safetensors", {"format": "pt"})
    index["weight_map"][name] = "model.z-moses-00001.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(load(source).state_dict()[name], value)
    (source / "model.z-moses-00001.safetensors").rename(source / "a.safetensors")
    index["weight_map"][name] = "a.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError) as caught:
        surgery.open_checkpoint(source)
    assert caught.value.code == "tensor_unlisted"
    # and rightly so
    assert not torch.equal(load(source).state_dict()[name], value)


def test_verify_finds_what_changed_since_it_was_hashed(checkpoints, tmp_path, capsys):
    source = checkpoints("mixtral", "fused", 2)
    done = surgery.prune(source, tmp_path / "out", keep=[2, 1], writing=Writing(hash=True))
    assert main(["verify", str(done.path)]) == 0
    assert main(["verify", str(done.path), "--against", str(source)]) == 0
    assert "experts and 4 gate rows are bit-identical" in capsys.readouterr().out
    shard = sorted(done.path.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert main(["verify", str(done.path)]) == 1
    assert "not those that were recorded" in capsys.readouterr().out
    assert main(["verify", str(done.path), "--against", str(source)]) == 1
    assert main(["verify", str(source), "--against", str(done.path)]) == 2
    assert "give the plan" in capsys.readouterr().err


@pytest.mark.parametrize("in_place", [False, True])
def test_hashes_are_of_every_tensor_that_was_kept(in_place, copied, tmp_path):
    source = copied("olmoe", "per-expert", 5)
    writing = Writing(hash=True, in_place=in_place, link=not in_place)
    done = surgery.grow(source, None if in_place else tmp_path / "out", add=1, writing=writing)
    assert done.description["unchanged_shards"] >= 1
    hashes = json.loads((done.path / "moses_surgery.json").read_text())["blake3"]
    made = {n for n in names_of(done.path) if ".experts.4." in n or ".mlp.gate." in n}
    assert set(hashes) == names_of(done.path) - made
    assert main(["verify", str(done.path)]) == 0
