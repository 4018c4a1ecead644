"""How well the task identifier tells eight real tasks apart: a table for each choice, as markdown and as JSON.

    python benches/identify.py --stream ../shared/data/stream8 [--model minilm] [--num-test 0] [--cache FOLDER]

"full" is the prompt as it stands; "text" is what is left without its first two lines (the question and the options) and
its last ("Answer:"). An identifier is fitted on whole prompts, on the text alone, or on both views
(`moses.stream.identify.prompt_views`), and judged on test prompts that it never saw: the share whose most likely task
is the right one. "unknown" is the share of known tasks' prompts taken for unknown; "found" the share of a left-out
task's prompts that are, over all tasks left out in turn. A prompt is cut to 128 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch

from moses.models import load_model
from moses.stream import load_stream
from moses.stream.identify import IdentifierConfig, TaskIdentifier, layer_features, prompt_views

MAX_TOKENS = 128
BATCH = 16
VIEWS = ("full", "text")
RESULTS = Path(__file__).parent / "results" / "identify.json"


def text_of(prompt: str) -> str:
    """What follows the options, without a trailing 'Answer:'."""
    return "\n".join(prompt.split("\n")[2:]).removesuffix("Answer:").strip()


def extract(model, tokenizer, prompts, layers):
    """(prompts, layers, D) float32."""
    encoded = tokenizer(prompts, truncation=True, max_length=MAX_TOKENS)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    rows = [None] * len(encoded)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        longest = max(len(encoded[index]) for index in chosen)
        ids = torch.tensor([encoded[index] + [0] * (longest - len(encoded[index])) for index in chosen])
        mask = torch.tensor([[1] * len(encoded[index]) + [0] * (longest - len(encoded[index])) for index in chosen])
        for index, row in zip(chosen, layer_features(model, ids, mask, layers).cpu().numpy(), strict=True):
            rows[index] = row
    return np.stack(rows)


def load_features(args, layers):
    """{(view, part, task): (prompts, layers, D)}; the view "fit" holds all rows that `prompt_views` gives, with their
    prompt ids beside."""
    stream = load_stream(args.stream, num_test=args.num_test or None)
    model = tokenizer = None
    features = {}
    for task in stream.tasks:
        parts = {("train", view): [row.prompt for row in task.train[: args.num_train]] for view in VIEWS}
        parts |= {("test", view): [row.prompt for row in task.test] for view in VIEWS}
        for (part, view), prompts in parts.items():
            texts = [text_of(prompt) for prompt in prompts] if view == "text" else prompts
            file = (
                args.cache
                / f"{Path(args.model).name}-{'_'.join(map(str, layers))}-{view}-{part}-{task.name}-{len(texts)}.npy"
                if args.cache
                else None
            )
            if file and file.exists():
                features[view, part, task.name] = np.load(file)
                continue
            if model is None:
                model, tokenizer, _ = load_model(args.model)
            features[view, part, task.name] = extract(model, tokenizer, texts, layers)
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, features[view, part, task.name])
        # the generic way to the text must agree with the bench's own, or the table would promise what users do not get
        views, ids = prompt_views([row.prompt for row in task.train[: args.num_train]])
        assert views[len(ids) // 2 :] == [text_of(row.prompt) for row in task.train[: args.num_train]], task.name
    return [task.name for task in stream.tasks], features


def measure(config, columns, fit, names, features):
    """One row of the table."""
    started = time.perf_counter()
    dim = next(iter(features.values())).shape[-1]
    identifier = TaskIdentifier(config, dim)

    def add(task_id):
        chosen = VIEWS if fit == "both" else (fit,)
        rows = [features[view, "train", names[task_id]][:, columns] for view in chosen]
        identifier.add_task(task_id, np.concatenate(rows), [*range(len(rows[0]))] * len(rows))

    for task_id in range(len(names)):
        add(task_id)
    row = {"fit": fit, "bytes": max(identifier.nbytes(task_id) for task_id in identifier.task_ids)}
    for view in VIEWS:
        right, answered, unknown, found, total = 0, 0, 0, 0, 0
        confusion = np.zeros((len(names), len(names) + 1), int)
        for task_id, name in enumerate(names):
            result = identifier.predict(features[view, "test", name][:, columns])
            right += int((result.task_ids == task_id).sum())
            answered += int(((result.task_ids == task_id) & ~result.unknown).sum())
            unknown += int(result.unknown.sum())
            total += len(result.task_ids)
            np.add.at(confusion[task_id], np.where(result.unknown, len(names), result.task_ids), 1)
        for task_id, name in enumerate(names):
            identifier.remove_task(task_id)
            found += int(identifier.predict(features[view, "test", name][:, columns]).unknown.sum())
            add(task_id)
        row[view] = {
            "accuracy": right / total,
            "right_and_known": answered / total,
            "unknown": unknown / total,
            "found": found / total,
            "confusion": confusion.tolist(),
        }
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", required=True)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--num-train", type=int, default=500)
    parser.add_argument("--num-test", type=int, default=0, help="test prompts a task; 0: all")
    parser.add_argument("--cache", type=Path, help="a folder that keeps the features between calls")
    args = parser.parse_args()
    config = load_model(args.model)[0].config.get_text_config()
    last = config.num_hidden_layers
    layers = [0, last // 2, last]
    names, features = load_features(args, layers)
    # what `prompt_features` gives are the embeddings and one layer; a layer alone is that layer twice
    default, middle = IdentifierConfig(), last // 2
    both = ("both", "full", "text")
    choices = [("ridge", (0, middle), fit, default) for fit in both]
    choices += [("ridge", (layer, layer), "both", default) for layer in layers]
    choices += [("ridge", (0, last), "both", default)]
    choices += [("cosine", (middle, middle), fit, dataclasses.replace(default, kind="cosine")) for fit in both]
    for setting in (
        {"num_features": 120},
        {"num_features": 240},
        {"num_features": 480},
        {"ridge": 1.0},
        {"ridge": 40.0},
    ):
        choices += [("ridge", (0, middle), "both", dataclasses.replace(default, **setting))]
    rows = []
    print(
        "| kind | layers | features | ridge | fitted on | full | text | unknown full, text "
        "| found full, text | bytes a task |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for kind, pair, fit, config in choices:
        row = measure(config, [layers.index(layer) for layer in pair], fit, names, features)
        width = config.num_features if kind == "ridge" else ""
        cells = [kind, " and ".join(map(str, sorted(set(pair)))), width, config.ridge if kind == "ridge" else "", fit]
        cells += [f"{100 * row[view]['accuracy']:.2f}" for view in VIEWS]
        cells += [", ".join(f"{100 * row[view][name]:.2f}" for view in VIEWS) for name in ("unknown", "found")]
        print("|", " | ".join(map(str, [*cells, row["bytes"]])), "|", flush=True)
        rows.append({"kind": kind, "layers": pair, "config": dataclasses.asdict(config), **row})
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    command = f"python benches/identify.py --stream STREAM8 --model {Path(args.model).name} --num-test {args.num_test}"
    document = {
        "command": command,
        "model": Path(args.model).name,
        "tasks": names,
        "num_train": args.num_train,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
