"""Settings are checked when they are made, and a wrong one names its field, value and what is allowed."""

from __future__ import annotations

import pytest

from moses.config import MosesConfig, TrainConfig, from_settings, to_json
from moses.errors import ConfigError
from moses.methods.peft_adapters import PeftMethodConfig


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (MosesConfig, "num_experts", 0),
        (MosesConfig, "rank", 2.5),
        (MosesConfig, "rank", True),
        (MosesConfig, "top_k", 5),
        (MosesConfig, "density", 0.0),
        (MosesConfig, "density", 1.5),
        (MosesConfig, "growth", float("nan")),
        (MosesConfig, "alpha", float("inf")),
        (MosesConfig, "granularity", "row"),
        (MosesConfig, "ffn_experts", "moe"),
        (MosesConfig, "reuse", True),
        (MosesConfig, "target_modules", ()),
        (MosesConfig, "target_modules", ["q_proj", ""]),
        (MosesConfig, "router_dim", 0),
        (TrainConfig, "epochs", 0),
        (TrainConfig, "learning_rate", -1e-3),
        (TrainConfig, "learning_rate", "1e-3"),
        (TrainConfig, "precision", "int8"),
        (TrainConfig, "eval_modes", []),
        (TrainConfig, "eval_modes", ["til", "sometimes"]),
        (TrainConfig, "template", None),
        (PeftMethodConfig, "adapter", "dora"),
        (PeftMethodConfig, "alpha", 0),
    ],
)
def test_wrong_values_are_refused_by_name(kind, field, value):
    with pytest.raises(ConfigError) as caught:
        from_settings(kind, {field: value})
    assert f"{kind.__name__}.{field}" in str(caught.value) and "must be" in str(caught.value)
    assert caught.value.code == "bad_setting"


@pytest.mark.parametrize("kind", [MosesConfig, TrainConfig, PeftMethodConfig])
def test_json_round_trip_and_unknown_keys(kind):
    config = from_settings(kind, {"seed": 7})
    assert from_settings(kind, to_json(config)) == config
    with pytest.raises(ConfigError, match=r"seeed.*seed") as caught:
        from_settings(kind, {"seeed": 7})
    assert caught.value.code == "unknown_setting"


def test_lists_become_tuples():
    assert MosesConfig(target_modules=["q_proj"]).target_modules == ("q_proj",)
    assert from_settings(MosesConfig, to_json(MosesConfig(target_modules=("a", "b")))).target_modules == ("a", "b")


def test_the_scale_is_alpha_over_rank():
    assert MosesConfig(alpha=16, rank=4).scale == 4.0
