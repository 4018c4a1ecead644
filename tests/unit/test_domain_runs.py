"""Runs over text domains on a tiny model: perplexity by hand, every method, resume and load, one set of weights stored once."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import moses
from moses.checkpoint import forget_task
from moses.cli import main
from moses.config import TrainConfig
from moses.errors import ModelError, RunError, StreamError
from moses.methods.finetune import FinetuneConfig, FinetuneMethod
from moses.metrics import transfer_metrics
from moses.perplexity import TextLoss, TextScorer, perplexity
from moses.progress import Progress
from moses.session import Session
from moses.stream import Example, Stream, load_stream, text_example
from moses.stream.prompt import IGNORED
from moses.stream.task import Task
from moses.stream.text import packed, windows

SETTINGS = {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "max_length": 32}


class Letters:
    """A tokenizer of one token a letter; 1 starts a text."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 0

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert not add_special_tokens
        return {"input_ids": [10 + ord(letter) % 80 for letter in text]}


@pytest.fixture(scope="module")
def stream():
    words = {"animal": "cat dog bird fish", "plant": "tree leaf root seed", "place": "town hill lake road"}
    tasks = []
    for name, text in words.items():
        texts = [
            " ".join(order) for order in itertools.permutations((f"the {word} is {name}" for word in text.split()), 3)
        ]
        rows = [text_example(line) for line in texts]
        tasks.append(Task(name, tuple(rows[:14]), tuple(rows[14:18]), tuple(rows[18:]), "perplexity", domain=name))
    return Stream("words", tuple(tasks))


def train(folder, out, stream, method="finetune", **more):
    return moses.train(
        str(folder),
        stream=stream,
        method=method,
        output_dir=out,
        settings=SETTINGS | more.pop("settings", {}),
        progress=Progress(quiet=True),
        **more,
    )


@given(st.lists(st.text("abcdefgh", min_size=1, max_size=40), min_size=1, max_size=5), st.integers(2, 12))
def test_every_token_is_predicted_once(texts, max_length):
    wanted = [token for text in texts for token in Letters()(text, add_special_tokens=False)["input_ids"]]
    rows = packed(Letters(), texts, max_length)
    assert [label for row in rows for label in row["labels"] if label != IGNORED] == wanted
    for row in rows:
        assert 2 <= len(row["input_ids"]) <= max_length and row["input_ids"][0] == 1 and row["labels"][0] == IGNORED
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["attention_mask"])
        assert all(label in (token, IGNORED) for token, label in zip(row["input_ids"], row["labels"], strict=True))
    parts = [window for text in texts for window in windows(Letters(), text, max_length)]
    assert [token for window in parts for token in window[1:]] == wanted
    assert all(window[0] == 1 and len(window) <= max_length for window in parts)


def test_perplexity_is_exp_of_the_mean_over_tokens_not_over_texts():
    losses = [TextLoss(3.0, 1), TextLoss(1.0, 3)]
    assert perplexity(losses) == pytest.approx(math.e)


@pytest.mark.parametrize("nll", [float("nan"), float("inf"), 1e6])
def test_a_loss_that_is_not_finite_is_told(nll):
    with pytest.raises(RunError, match="lower learning_rate") as error:
        perplexity([TextLoss(nll, 1)])
    assert error.value.code == "diverged"
    with pytest.raises(RunError):
        perplexity([])


def test_losses_are_those_of_the_model_and_owe_nothing_to_the_batch(tiny_model):
    model = tiny_model("llama")
    texts = ["abcabcabc", "hello", "a much longer text than the others are", "x"]
    one = TextScorer(Letters(), TrainConfig(max_length=8, eval_batch_size=1)).losses(model, texts)
    many = TextScorer(Letters(), TrainConfig(max_length=8, eval_batch_size=32)).losses(model, texts)
    for text, left, right in zip(texts, one, many, strict=True):
        assert left.num_tokens == right.num_tokens == len(text)
        assert left.nll == pytest.approx(right.nll, rel=1e-5)
        nll = 0.0
        for window in windows(Letters(), text, 8):
            logits = model(torch.tensor([window])).logits[0].detach().double().log_softmax(-1)
            nll -= sum(float(logits[place, token]) for place, token in enumerate(window[1:]))
        assert left.nll == pytest.approx(nll, rel=1e-5)


def test_measures_of_perplexity_lose_upwards():
    matrix = [[10.0, 50.0], [14.0, 20.0]]
    measures = transfer_metrics(matrix, [60.0, 60.0], lower_is_better=True)
    assert measures == {"op": 17.0, "avg": 13.5, "bwt": 4.0, "fwt": -10.0, "forgetting": 4.0}
    assert transfer_metrics([[10.0, 50.0], [9.0, 20.0]], [60.0, 60.0], lower_is_better=True)["forgetting"] == 0.0
    assert transfer_metrics([[10.0, 50.0], [9.0, 20.0]], [60.0, 60.0])["forgetting"] == 1.0


@pytest.mark.parametrize("method", ["finetune", "joint", "sequential", "moses"])
def test_every_method_learns_domains(tiny_folder, tmp_path, stream, method):
    run = train(tiny_folder, tmp_path / "run", stream, method)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["lower_is_better"] is True
    assert set(results["task_metrics"].values()) == {"perplexity"}
    matrix, base = run.matrix, results["base"]
    assert len(matrix) == 3 and all(len(row) == 3 and None not in row for row in (base, *matrix))
    assert all(matrix[t][t] < base[t] for t in range(3))  # lower is better
    assert results["tail"]["matrix"] and results["tail"]["task_accuracy"] is not None
    if method == "moses":
        assert all(matrix[t][i] == matrix[i][i] for i in range(3) for t in range(i, 3))
    if method == "joint":
        assert matrix[0] == matrix[1] == matrix[2]
    if method in ("finetune", "joint"):
        assert results["til"]["matrix"] == results["tail"]["matrix"] or results["tail"]["confusion"]
        weights = [task["bytes"]["weights"] for task in results["capacity"]]
        model = sum(tensor.numel() * tensor.element_size() for tensor in run.model.parameters())
        assert model <= weights[0] <= model + 10_000 and sum(weights[1:]) < 10_000  # stored once


def test_finetuning_loads_and_resumes_to_the_same_bits(tiny_folder, tmp_path, stream, monkeypatch):
    whole = train(tiny_folder, tmp_path / "whole", stream, settings={"kl": 0.5})
    original = Session.commit_task

    def die_after_second(self, name, *arguments):
        if name == "plant":
            raise KeyboardInterrupt
        original(self, name, *arguments)

    monkeypatch.setattr(Session, "commit_task", die_after_second)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_folder, tmp_path / "cut", stream, settings={"kl": 0.5})
    monkeypatch.undo()
    cut = train(tiny_folder, tmp_path / "cut", stream, settings={"kl": 0.5}, resume=True)
    assert cut.matrix == whole.matrix
    loaded = moses.load(tmp_path / "cut")
    for (name, left), right in zip(loaded.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(left, right), name
    with pytest.raises(RunError, match="one set of weights") as error:
        forget_task(tmp_path / "cut", "place")
    assert error.value.code == "not_separable"
    files = sorted(path.stat().st_size for path in (tmp_path / "cut" / "tasks").rglob("*.safetensors"))
    model = sum(tensor.numel() * tensor.element_size() for tensor in loaded.parameters())
    assert files[-1] >= model and sum(files[:-1]) < 1000  # superseded versions are gone


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_kl_is_to_the_model_before_the_task(tiny_model, tiny_batch, family):
    model, batch = tiny_model(family), tiny_batch(family)
    batch["labels"][:, :3] = IGNORED
    method = FinetuneMethod(model, FinetuneConfig(kl=2.0))
    method.begin_task("a", None, None, None)
    old = model(**batch).logits.detach()
    assert method.extra_loss(model, batch, model(**batch), None).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    outputs = model(**batch)
    loss = method.extra_loss(model, batch, outputs, None)
    place = slice(2, -1) if family == "llama" else slice(3, None)  # a decoder's logits are for the next token
    before, after = old[:, place].log_softmax(-1), outputs.logits[:, place].detach().log_softmax(-1)
    assert loss.item() == pytest.approx(2.0 * float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-4)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    method.end_task("a")
    assert method.extra_loss(model, batch, outputs, None) is None


def test_the_base_model_answers_as_before_while_another_is_trained(tiny_model):
    model = tiny_model("llama")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tokens = torch.arange(10, 20)[None]
    logits = model(tokens).logits.detach()
    method = FinetuneMethod(model, FinetuneConfig())
    method.begin_task("a", None, None, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    method.end_task("a")
    with method.answer(None):
        assert torch.equal(model(tokens).logits, logits)
    with method.answer("a"):
        assert not torch.equal(model(tokens).logits, logits)
    assert all(torch.equal(new, old + 0.1) for new, old in zip(model.parameters(), before, strict=True))


def test_streams_that_a_run_cannot_learn_are_refused_before_a_folder_is_made(tiny_folder, tmp_path, stream):
    tiny = load_stream("tiny").tasks[:1]
    with pytest.raises(StreamError, match="choose by --tasks") as error:
        train(tiny_folder, tmp_path / "run", Stream("mixed", (*stream.tasks, *tiny)))
    assert error.value.code == "mixed_metrics" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_texts_need_a_decoder(tiny_model, tmp_path, stream, family):
    with pytest.raises(ModelError):
        moses.train(tiny_model(family), Letters(), stream=stream, method="finetune", output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_empty_text_is_told():
    class Nothing(Letters):
        def __call__(self, text, **options):
            return {"input_ids": []}

    with pytest.raises(StreamError, match="makes no token"):
        windows(Nothing(), "\u200b", 8)


def test_examples_say_what_they_show():
    assert Example("p", "a").shown == "p" and text_example("t").shown == "t"


def test_the_command_line_learns_domains(tiny_folder, tmp_path, stream, capsys):
    for task in stream.tasks:
        (tmp_path / "words" / task.name).mkdir(parents=True)
        for split in ("train", "eval", "test"):
            rows = [{"text": row.answer} for row in getattr(task, split)]
            (tmp_path / "words" / task.name / f"{split}.json").write_text(json.dumps(rows))
    words = ["train", "--model", str(tiny_folder), "--stream", str(tmp_path / "words"), "--tasks", "plant,place"]
    words += ["--method", "finetune", "--out", str(tmp_path / "run"), "--set", "epochs=1", "--set", "kl=0.1"]
    assert main([*words, "--set", "max_length=64", "--set", "eval_limit=2"]) == 0
    shown = capsys.readouterr().out
    assert "after plant" in shown and "lower is better" in shown
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "perplexity, lower is better" in (tmp_path / "run" / "report.html").read_text()


def test_what_tells_domains_apart_reads_texts_without_the_template_of_a_chat(stream, tiny_folder, tmp_path):
    from moses.models import load_model

    found = []
    for template in (
        None,
        "{% for m in messages %}a long template goes around every message: {{ m['content'] }}{% endfor %}",
    ):
        model, tokenizer, _ = load_model(str(tiny_folder))
        tokenizer.chat_template = template
        out = tmp_path / str(template is None)
        run = moses.train(
            model,
            tokenizer,
            stream=stream,
            output_dir=out,
            settings=SETTINGS | {"epochs": 1},
            progress=Progress(quiet=True),
        )
        found.append(run)
    plain, chat = found
    assert chat.results["tail"]["matrix"] == plain.results["tail"]["matrix"]
    files = [sorted((run.path / "identifier").iterdir()) for run in found]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]] != []
