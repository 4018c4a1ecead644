"""What a user chooses: frozen dataclasses, checked when they are made.

A wrong value is a `ConfigError` that names the field, the value and what is allowed, before any model is loaded.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from .errors import ConfigError

Granularity = Literal["rank", "element"]
Budget = Literal["model", "tensor"]
RouterScope = Literal["block", "layer"]
WeightDtype = Literal["float32", "bfloat16", "float16"]
FFNExperts = Literal["adapter"]
Config = TypeVar("Config")
Reuse = Literal["similar", "all", "none"]


@dataclass(frozen=True, kw_only=True)
class MosesConfig:
    """Mixtures of SubExperts (Kang, arXiv 2511.06237), as design section 3.1 says it.

    Attributes:
        target_modules: names (or their ends, as in PEFT) of the linear maps that get a bank; `None` takes query, value
            and the projections of the FFN, as they are called in the model's family.
        num_experts: N, low-rank experts in a new bank.
        rank: R, rank of each expert.
        top_k: experts a token uses.
        alpha: numerator of the scale alpha / rank of the update.
        candidates: free components of a linear map that a new task starts with, spread over its experts (`rank` only).
        ffn_experts: `adapter` puts, beside every FFN, a mixture of N small FFNs (down, GELU, up) in place of the banks at its projections,
            each as wide as the bytes of `rank` components at all of them; None leaves the low-rank banks there.
        granularity: what a mask selects: whole rank components (`rank`) or single weights (`element`).
        weight_dtype: of the weights that tasks own, in memory and on disk. An open task trains float32 weights and computes with
            them rounded, so that what was trained is what answers. Bytes, and so budgets, count in it.
        density: share of the bank's bytes that the first task may use.
        growth: share of the first task's budget that each later task may add as newly used bytes.
        budget: whether candidates compete over the whole `model`, or within each `tensor` as in the paper.
        warmup: share of a task's steps after which its candidates are cut to the budget.
        reuse: which earlier sub-experts a new task starts from: those of the `similar` task (in `moses.train` the one that serves its
            training examples best), of `all`, of `none`.
        router: one router a `block` (shared by its linear maps) or one a `layer` (linear map).
        router_dim: width of the fixed random space that routers work in; `None` is the input's own width.
        head_norm: whether what reaches a classification head is brought to zero mean and unit variance.
        seed: of every random initial value, of the projections and of the routers.
    """

    target_modules: tuple[str, ...] | str | None = None
    num_experts: int = 4
    rank: int = 8
    top_k: int = 2
    alpha: float = 32.0
    candidates: int = 8
    ffn_experts: FFNExperts | None = None
    granularity: Granularity = "rank"
    weight_dtype: WeightDtype = "bfloat16"
    density: float = 0.1
    growth: float = 0.4
    budget: Budget = "model"
    warmup: float = 1 / 3
    reuse: Reuse = "similar"
    router: RouterScope = "block"
    router_dim: int | None = 16
    head_norm: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        as_tuple(self, "target_modules")
        names = self.target_modules
        if (
            names is not None
            and not isinstance(names, str)
            and not (isinstance(names, tuple) and names and all(isinstance(name, str) and name for name in names))
        ):
            raise _wrong(self, "target_modules", "a name, a list of names, or null")
        for field, least in (("num_experts", 1), ("rank", 1), ("top_k", 1), ("candidates", 1), ("seed", 0)):
            check_int(self, field, least)
        if self.router_dim is not None:
            check_int(self, "router_dim", 1)
        if self.top_k > self.num_experts:
            raise _wrong(self, "top_k", f"at most num_experts ({self.num_experts})")
        for field in ("density", "growth"):
            check_real(self, field, 0.0, 1.0, open_low=True)
        check_real(self, "warmup", 0.0, 1.0)
        check_real(self, "alpha", 0.0, float("inf"), open_low=True)
        for field, choices in (
            ("ffn_experts", (None, "adapter")),
            ("granularity", ("rank", "element")),
            ("weight_dtype", ("float32", "bfloat16", "float16")),
            ("budget", ("model", "tensor")),
            ("reuse", ("similar", "all", "none")),
            ("router", ("block", "layer")),
            ("head_norm", (True, False)),
        ):
            check_choice(self, field, choices)

    @property
    def scale(self) -> float:
        """Factor alpha / rank of the low-rank update."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How each task is trained, whatever the method. Passed on to the Trainer of transformers.

    Attributes:
        epochs: passes over a task's training examples.
        batch_size: examples a step and device.
        gradient_accumulation: batches an optimizer step.
        learning_rate: peak of the linear schedule.
        weight_decay: of AdamW, on the task's own parameters (nothing else is in the optimizer).
        warmup_ratio: share of the steps in which the learning rate rises.
        max_grad_norm: gradients are clipped to this norm.
        max_length: tokens of a prompt with its answer; longer prompts are cut in the middle and counted.
        precision: `float32`, or `bfloat16` or `float16` mixed precision.
        template: `auto` uses the tokenizer's chat template where it has one, `chat` insists on it, `plain` gives the bare text.
        eval_batch_size: prompts a batch in evaluation.
        eval_limit: at most so many test items a task; `None` is all.
        eval_rows: evaluate `all` rows of R, or the `final` row only, and with the task given the diagonal (other cells are null).
        eval_modes: `til`, `tail`, or both.
        max_new_tokens: of a greedy answer; `None` is the longest training answer's length plus four.
        seed: of data order and of everything the method draws.
    """

    epochs: int = 3
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_ratio: float = 0.06
    max_grad_norm: float = 1.0
    max_length: int = 512
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    template: Literal["auto", "chat", "plain"] = "auto"
    eval_batch_size: int = 32
    eval_limit: int | None = None
    eval_rows: Literal["all", "final"] = "all"
    eval_modes: tuple[str, ...] = ("til", "tail")
    max_new_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        as_tuple(self, "eval_modes")
        for field, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("gradient_accumulation", 1),
            ("max_length", 8),
            ("eval_batch_size", 1),
            ("seed", 0),
        ):
            check_int(self, field, least)
        for field in ("eval_limit", "max_new_tokens"):
            if getattr(self, field) is not None:
                check_int(self, field, 1)
        check_real(self, "learning_rate", 0.0, 1e3, open_low=True)
        check_real(self, "weight_decay", 0.0, 1e3)
        check_real(self, "warmup_ratio", 0.0, 1.0)
        check_real(self, "max_grad_norm", 0.0, 1e9, open_low=True)
        check_choice(self, "precision", ("float32", "bfloat16", "float16"))
        check_choice(self, "eval_rows", ("all", "final"))
        check_choice(self, "template", ("auto", "chat", "plain"))
        if not self.eval_modes or any(mode not in ("til", "tail") for mode in self.eval_modes):
            raise _wrong(self, "eval_modes", 'a list of "til" and "tail"')


def from_settings(cls: type[Config], settings: dict[str, Any]) -> Config:
    """`cls(**settings)` with unknown and missing keys as a `ConfigError` that lists the known ones."""
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}; known settings are {', '.join(known)}", code="unknown_setting")
    return cls(**settings)


def to_json(config: object) -> dict[str, Any]:
    """The config as JSON values, which `from_settings` reads back to an equal config."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[call-overload]
    return values


def _wrong(config: object, field: str, allowed: str) -> ConfigError:
    value = getattr(config, field)
    return ConfigError(f"{type(config).__name__}.{field} is {value!r}; it must be {allowed}", code="bad_setting")


def as_tuple(config: object, field: str) -> None:
    """Make a list, as JSON has it, the tuple that a frozen dataclass wants."""
    if isinstance(getattr(config, field), list):
        object.__setattr__(config, field, tuple(getattr(config, field)))


def check_int(config: object, field: str, least: int) -> None:
    """Raise a `ConfigError` unless the field is an int (no bool) of at least `least`."""
    value = getattr(config, field)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(config, field, f"a whole number of at least {least}")


def check_real(config: object, field: str, low: float, high: float, open_low: bool = False) -> None:
    """Raise a `ConfigError` unless the field is a finite number from `low` to `high` (above `low`, where that is open)."""
    value = getattr(config, field)
    good = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
        and value != float("inf")
    )
    if not good or (open_low and value == low):
        raise _wrong(config, field, f"a number {'above' if open_low else 'from'} {low:g} to {high:g}")


def check_choice(config: object, field: str, choices: tuple[object, ...]) -> None:
    """Raise a `ConfigError` unless the field is one of `choices`."""
    if getattr(config, field) not in choices:
        raise _wrong(config, field, f"one of {', '.join(map(str, choices))}")
