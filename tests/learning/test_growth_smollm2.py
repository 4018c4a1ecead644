"""Upcycled and extracted SmolLM2-135M: the promises of the tiny models on a real one, in float32."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from moses.growth import load_folder, moe_blocks, save_model
from moses.growth.extract import extract
from moses.growth.upcycle import upcycle
from moses.models import load_model

pytestmark = [
    pytest.mark.skipif(
        "MOSES_PROVE" not in os.environ, reason="half a gigabyte of weights a model; part of `make prove`"
    ),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.timeout(1800),
]
TEXT = (
    "The capital of France is Paris, and the river that flows through it is the Seine. def mean(values): return sum(values) / len(values). "
    "Die Katze sitzt auf dem Dach. In 1969 two people walked on the Moon for the first time, and some 600 million people watched."
)
SCRIPT = """
import sys, torch, transformers as hf
torch.set_num_threads(1)
model, info = hf.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
ids = hf.AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[3], return_tensors="pt").input_ids
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, sys.argv[2])
assert not any(name.startswith("moses") for name in sys.modules)
print(type(model).__name__)
"""


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def plain(folder, tmp_path) -> tuple[str, torch.Tensor]:
    """The class and the logits of a folder in a process without moses."""
    out = tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), str(out), TEXT],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip(), torch.load(out, weights_only=True)


def report(name: str, before: torch.Tensor, after: torch.Tensor) -> float:
    difference = float((before - after).abs().max() / before.abs().max())
    same = float((before.argmax(-1) == after.argmax(-1)).float().mean())
    print(
        f"{name}: {difference:.2e} of the largest logit, {100 * same:.1f}% of next tokens the same, {before.shape[1]} tokens"
    )
    return difference


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"every": 1}, "MixtralForCausalLM"),
        ({"every": 2}, "Qwen2MoeForCausalLM"),
        ({"layers": [27, 28, 29]}, "Qwen2MoeForCausalLM"),
        ({"every": 2, "router": "dense"}, ""),
        ({"every": 2, "keep_dense": True}, ""),
    ],
    ids=str,
)
def test_upcycled(settings, kind, tmp_path):
    dense, tokenizer, _ = load_model("smollm2-135m-instruct", "float32")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    before = logits(dense, ids)
    moe = upcycle(dense, 4, **settings)
    after = logits(moe, ids)
    assert report(f"upcycled {settings}", before, after) < 1e-5
    folder = save_model(moe, tmp_path / "moe", tokenizer)
    if not kind:
        assert torch.equal(logits(load_folder(folder), ids), after)
        return
    found, loaded = plain(folder, tmp_path)
    assert found == kind and torch.equal(loaded, after)


def test_extracted(tmp_path):
    dense, tokenizer, _ = load_model("smollm2-135m-instruct", "float32")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    moe = upcycle(dense, 4, every=1, noise=0.05)
    blocks = [block.index for block in moe_blocks(moe)]
    small = extract(moe, {number: [0] for number in blocks})
    assert report("one expert, the FFN itself", logits(dense, ids), logits(small, ids)) == 0.0
    found, loaded = plain(save_model(small, tmp_path / "dense", tokenizer), tmp_path)
    assert found == "LlamaForCausalLM" and torch.equal(loaded, logits(dense, ids))
    two = extract(moe, {number: [3, 1] for number in blocks})
    found, loaded = plain(save_model(two, tmp_path / "two", tokenizer), tmp_path)
    assert found == "MixtralForCausalLM" and torch.equal(loaded, logits(two, ids))
    merged = extract(moe, {number: [0, 1, 2, 3] for number in blocks}, merge=True)
    assert report("four noisy experts averaged", logits(dense, ids), logits(merged, ids)) < 1.0
