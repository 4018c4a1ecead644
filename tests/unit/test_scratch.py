"""Models from random weights: any router, transformers' own classes, the tokenizer, and what a file may not ask for."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch

import moses
from moses.cli import main
from moses.errors import ConfigError, ModelError, StoreError, StreamError
from moses.growth.layer import MixtureFFN
from moses.models import load_model
from moses.scratch import SmallMoEConfig, make_model, make_tokenizer, read_model_config, write_from_scratch
from moses.stream import Stream, text_example
from moses.stream.task import Task

SMALL = {"hidden_size": 32, "layers": 2, "heads": 2, "ffn_size": 16, "experts": 4, "top_k": 2, "vocab_size": 300}
HF = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 300,
}
TEXTS = [f"line {number}: the quick brown fox — größer als 東京" for number in range(12)]


@pytest.fixture(scope="module")
def stream():
    rows = tuple(map(text_example, TEXTS))
    return Stream("lines", (Task("lines", rows[:8], rows[8:10], rows[10:], "perplexity", domain="lines"),))


@pytest.fixture
def config(tmp_path):
    def write(fields):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return path

    return write


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(TEXTS, 300)


def test_a_tokenizer_is_lossless_for_any_text(tokenizer):
    assert len(tokenizer) <= 300 and tokenizer.pad_token_id == 0 and tokenizer.bos_token_id == 1
    text = "größer als 東京\n\tdef f(x): return '€'"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("router", ["topk", "noisy_topk", "gshard", "switch", "dense", "expert_choice", "random"])
def test_every_router_learns_and_is_read_back(tmp_path, config, stream, router):
    write_from_scratch(config(SMALL | {"router": router, "every": 2}), stream, tmp_path / "base", seed=3)
    model, _, kind = load_model(tmp_path / "base")
    assert kind == "causal" and sum(isinstance(module, MixtureFFN) for module in model.modules()) == 1
    settings = {"epochs": 2, "batch_size": 4, "max_length": 32, "learning_rate": 0.01, "eval_modes": ["til"]}
    run = moses.train(
        str(tmp_path / "base"), stream=stream, method="finetune", output_dir=tmp_path / "run", settings=settings
    )
    assert run.matrix[0][0] < run.results["base"][0]
    loaded, trained = moses.load(tmp_path / "run"), run.model
    assert all(torch.equal(left, right) for left, right in zip(loaded.parameters(), trained.parameters(), strict=True))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "llama"])
def test_classes_of_transformers_are_built_and_weigh_their_balance(tokenizer, model_type):
    model = make_model(HF | {"model_type": model_type}, tokenizer)
    assert model.config.vocab_size == len(tokenizer) and model.config.model_type == model_type
    ids = torch.tensor([[1, 5, 6, 7]])
    outputs = model(input_ids=ids, labels=ids)
    assert (getattr(outputs, "aux_loss", None) is not None) == (model_type != "llama")


def test_the_seed_is_the_weights(tokenizer):
    first, again, other = (make_model(SMALL, tokenizer, seed) for seed in (0, 0, 1))
    assert all(torch.equal(left, right) for left, right in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_a_given_tokenizer_is_taken(tmp_path, config, stream, tokenizer):
    tokenizer.save_pretrained(tmp_path / "words")
    write_from_scratch(config(SMALL), stream, tmp_path / "base", tokenizer=str(tmp_path / "words"))
    model, words, _ = load_model(tmp_path / "base")
    assert words.get_vocab() == tokenizer.get_vocab() and model.config.vocab_size == len(tokenizer)


def test_the_shipped_config_is_good():
    path = resources.files("moses") / "configs" / "small-moe.json"
    assert SmallMoEConfig(**json.loads(path.read_text())) == SmallMoEConfig()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (SMALL | {"router": "best"}, ConfigError, "SmallMoEConfig.router is 'best'; it must be one of topk"),
        (SMALL | {"top_k": 5}, ConfigError, "top_k is 5; it must be at most experts (4)"),
        (SMALL | {"heads": 3}, ConfigError, "heads is 3"),
        (SMALL | {"layers": 10**9}, ConfigError, "layers is 1000000000; it must be at most"),
        (SMALL | {"vocab_size": 20}, ConfigError, "vocab_size is 20"),
        (SMALL | {"vocab_size": "many"}, ConfigError, "vocab_size is 'many'"),
        (SMALL | {"depth": 3}, ConfigError, "unknown setting 'depth'"),
        ({"model_type": "nonsense"}, ConfigError, "model_type is 'nonsense'"),
        ({"model_type": 3}, ConfigError, "model_type is 3"),
        (HF | {"model_type": "bert"}, ModelError, "is a classifier; give a decoder"),
        (HF | {"model_type": "mixtral", "num_attention_heads": "two"}, ConfigError, "mend the f"),
        ([1], ConfigError, "is not a JSON object"),
    ],
)
def test_a_bad_file_is_one_line_and_nothing_is_written(tmp_path, config, stream, fields, error, message):
    with pytest.raises(error) as caught:
        write_from_scratch(config(fields), stream, tmp_path / "base")
    assert message in str(caught.value)
    assert not (tmp_path / "base").exists()


def test_a_file_that_is_no_json_or_not_there_is_told(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        read_model_config(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(StreamError, match=r"bad\.json:1"):
        read_model_config(tmp_path / "bad.json")


def test_a_folder_that_is_there_is_kept(tmp_path, config, stream):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine").write_text("x")
    with pytest.raises(StoreError):
        write_from_scratch(config(SMALL), stream, tmp_path / "base")


def test_the_command_line_trains_from_scratch(tmp_path, config, stream, capsys):
    folder = tmp_path / "words" / "lines"
    folder.mkdir(parents=True)
    for split in ("train", "eval", "test"):
        (folder / f"{split}.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    words = ["train", "--model", str(config(SMALL)), "--from-scratch", "--stream", str(tmp_path / "words")]
    words += ["--method", "finetune", "--out", str(tmp_path / "run"), "--set", "epochs=1", "--set", "max_length=32"]
    assert main(words) == 0
    assert (tmp_path / "run-base" / "moses_model.json").is_file()
    assert "after lines" in capsys.readouterr().out
    assert main([*words, "--resume"]) == 0  # the same base
    assert main(["train", "--tokenizer", "t", *words[1:2], "x", "--stream", "tiny", "--out", str(tmp_path / "x")]) == 2
