"""Lifelong-MoE: a new distribution adds experts and gate rows; the old ones are frozen (Chen et al., arXiv 2305.12281; design 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..config import as_tuple, check_choice, check_int, check_real
from ..errors import ConfigError
from ..growth.blocks import MoEBlock
from ..growth.ffns import DenseFFN
from ..growth.install import growing_places
from ..loss import distillation_loss
from ..routes import RouterOutput
from ..surgery.plan import Slot
from .growing import GrowingMethod

SAMPLE = 32  # training examples on which the most used experts are found


@dataclass(frozen=True, kw_only=True)
class LifelongMoEConfig:
    """Settings of `lifelong-moe`.

    Attributes:
        add: ΔE, experts that a task adds to every layer.
        every: FFNs of every so many blocks of a dense model become mixtures, with the FFN as their first expert; 2 as in the paper.
        layers: numbers of the blocks, in place of `every`.
        top_k: experts a token in layers that were dense (with 1, gates learn by the balance loss alone); a mixture keeps its own.
        kl: λ, weight of KL(old ‖ new) on the current data; 0 is without.
        balance_weight: of the balance loss, mean over the layers.
        noise: on a new expert and its gate row, relative to the deviation of each tensor that it is copied from.
        source: what new experts are copied from: the `most-used` ones on the new task's examples, or `fresh` ones.
        train_trunk: train everything that is no expert as well. Earlier answers are then not bit-identical, and the old model is a second copy of
            the trunk.
        known_domain: whether a task is answered with the experts that were there at its end alone, which is exact; else with all of them.
        seed: of noise, fresh experts and first gate rows.
    """

    add: int = 2
    every: int = 2
    layers: tuple[int, ...] | None = None
    top_k: int = 2
    kl: float = 1.0
    balance_weight: float = 0.01
    noise: float = 0.01
    source: str = "most-used"
    train_trunk: bool = False
    known_domain: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        as_tuple(self, "layers")
        for field, least in (("add", 1), ("every", 1), ("top_k", 1), ("seed", 0)):
            check_int(self, field, least)
        for field in ("kl", "balance_weight", "noise"):
            check_real(self, field, 0.0, 1e6)
        check_choice(self, "source", ("most-used", "fresh"))
        for field in ("train_trunk", "known_domain"):
            check_choice(self, field, (True, False))


class LifelongMoEMethod(GrowingMethod):
    """The method `lifelong-moe`."""

    name = "lifelong-moe"
    config_class = LifelongMoEConfig
    config: LifelongMoEConfig
    random = False

    def __init__(self, model: nn.Module, config: LifelongMoEConfig) -> None:
        super().__init__(model, config)
        self._visible: dict[int, dict[str, int]] = {}
        self._used: dict[str, Tensor] = {}
        self._old: dict[str, int] = dict(self._base)
        self._old_trunk: dict[str, Tensor] = {}
        self._add = config.add
        self.reads_logits = config.kl > 0

    @classmethod
    def places(cls, model: nn.Module, config: LifelongMoEConfig) -> Sequence[DenseFFN] | Sequence[MoEBlock]:
        return growing_places(model, mixtures=True, every=config.every, layers=config.layers)

    def see_task(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.config.source != "most-used":
            return
        wanted = min(SAMPLE, len(rows))
        device = next(self.model.parameters()).device
        training = self.model.training
        self.model.eval()
        used = {path: torch.zeros(layer.num_experts, dtype=torch.int64) for path, layer in self.layers.items()}
        with torch.no_grad(), self.context.watch() as seen:
            for place in range(wanted):
                row = rows[place * len(rows) // wanted]
                self.model(input_ids=torch.tensor([row["input_ids"]], device=device))
        for path, routed in seen:
            used[path] += routed.load.cpu()
        self.model.train(training)
        self._used = used

    def grow(self, task: int, name: str, domain: str | None, similar_to: str | None) -> None:
        config = self.config
        self._old = {path: layer.num_experts for path, layer in self.layers.items()}
        self._old_trunk = {key: p.detach().clone() for key, p in self._trunk().items()} if config.kl else {}
        for path, layer in self.layers.items():
            slots = [Slot(new=True)] * self._add
            if config.source == "most-used":
                used = self._used.get(path, torch.zeros(layer.num_experts, dtype=torch.int64))
                best = torch.sort(used, descending=True, stable=True).indices.tolist()
                slots = [Slot((best[i % len(best)],), new=True, noise=config.noise) for i in range(self._add)]
            layer.grow(slots, config.seed, task, path)

    def used_experts(self, task: int, path: str) -> list[int]:
        return list(range(self._base[path], self._visible[task][path]))

    def remember(self, task: int, tensors: dict[str, Tensor]) -> None:
        self._visible[task] = {path: layer.num_experts for path, layer in self.layers.items()}

    def recount(self) -> None:
        for info in self.registry.tasks():
            for layer in self.registry.layers():
                added = len(self._experts_of(layer.id, info.id, owned=False))
                self._visible[info.id][layer.name] = self._base[layer.name] + added

    def answer_task(self, task: int) -> AbstractContextManager[object]:
        return self.context.use(visible=self._visible[task]) if self.config.known_domain else nullcontext()

    # -- fixed capacity ------------------------------------------------------------------------------------------------

    def smallest_task(self) -> int:
        """One expert in every layer."""
        if self.config.train_trunk:
            raise ConfigError(
                "lifelong-moe with train_trunk=true keeps to no budget: every task writes the trunk; leave one of them out",
                code="no_budget",
            )
        return sum(self.expert_bytes().values())

    def usual_task(self) -> int:
        return self.config.add * self.smallest_task()

    def limit_task(self, num_bytes: int) -> None:
        self._add = max(1, min(self.config.add, num_bytes // self.smallest_task()))

    def give_up(self, num_bytes: int) -> dict[str, float]:
        """The rule: again and again, the added expert with the smallest share of its layer's training tokens goes; the older one at a tie."""
        sizes, worth = self.expert_bytes(), []
        for number, (path, layer) in enumerate(self.layers.items()):
            tokens = self.total_use(path).double()
            shares = (tokens / tokens.sum().clamp(min=1.0)).tolist()
            worth += [(shares[place], number, place, path) for place in range(self._base[path], layer.num_experts)]
        gone: dict[str, list[int]] = {}
        freed = 0
        for _, _, place, path in sorted(worth):
            if freed >= num_bytes:
                break
            gone.setdefault(path, []).append(place)
            freed += sizes[path]
        before = {info.name: self._used_bytes(info.id, sizes) for info in self.registry.tasks()}
        if gone:
            self.drop_experts(gone)
        lost = {}
        for info in self.registry.tasks():
            left = self._used_bytes(info.id, sizes)
            if left < before[info.name]:
                lost[info.name] = 1.0 - left / before[info.name]
        return lost

    def _used_bytes(self, task: int, sizes: dict[str, int]) -> int:
        return sum(
            sizes[info.name] * len(self._experts_of(info.id, task, owned=False)) for info in self.registry.layers()
        )

    # -- losses --------------------------------------------------------------------------------------------------------

    def extra_loss(
        self, model: nn.Module, inputs: dict[str, Any], outputs: Any, seen: Sequence[tuple[str, RouterOutput]]
    ) -> Tensor | None:
        """Balance, and λ times the mean of KL(old ‖ new) over the tokens that have a label."""
        balance = super().extra_loss(model, inputs, outputs, seen)
        labels = inputs.get("labels")
        if not self.config.kl or labels is None:
            return balance
        learned = labels[:, 1:] >= 0
        old = self._old_logits(inputs)[:, :-1][learned]
        drift = self.config.kl * distillation_loss(old, outputs.logits[:, :-1][learned])
        return drift if balance is None else balance + drift

    @torch.no_grad()
    def _old_logits(self, inputs: dict[str, Any]) -> Tensor:
        """The model as it was before the task: the same weights with the new gate rows out of sight, and a copy of a trunk that is trained."""
        given = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
        training = self.model.training
        self.model.eval()
        try:
            with self.context.use(visible=self._old), self.context.unseen():
                logits: Tensor = functional_call(self.model, self._old_trunk, kwargs=given).logits
        finally:
            self.model.train(training)
        return logits
