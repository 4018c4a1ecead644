"""Adapters of PEFT as the baselines use them: built, saved and loaded by PEFT, beside one classification head a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ..config import as_tuple, check_choice, check_int, check_real
from ..context import Group, TaskContext
from ..heads import TaskHead, install_head
from ..seeds import stable_seed
from ..targets import find_targets, linear_shape
from .lora_rank import rank_of

HEAD = "head."


@dataclass(frozen=True, kw_only=True)
class PeftMethodConfig:
    """Settings of the baselines.

    Attributes:
        adapter: `lora`, `vera` or `ia3`.
        rank: of LoRA's or VeRA's matrices.
        alpha: numerator of LoRA's scale; None is twice the rank.
        target_modules: as in `MosesConfig`; the same linear maps by default.
        head_norm: as in `MosesConfig`.
        seed: of the adapters' and heads' initial values.
    """

    adapter: Literal["lora", "vera", "ia3"] = "lora"
    rank: int = 8
    alpha: float | None = None
    target_modules: tuple[str, ...] | str | None = None
    head_norm: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        as_tuple(self, "target_modules")
        check_choice(self, "adapter", ("lora", "vera", "ia3"))
        check_choice(self, "head_norm", (True, False))
        check_int(self, "rank", 1)
        check_int(self, "seed", 0)
        if self.alpha is not None:
            check_real(self, "alpha", 0.0, 1e9, open_low=True)

    def peft(self, paths: list[str], rank: int | None = None) -> Any:
        """PEFT's own config for these linear maps; LoRA's scale stays where its `rank` is another."""
        if self.adapter == "vera":
            return VeraConfig(r=self.rank, target_modules=paths, save_projection=False, projection_prng_key=self.seed)
        if self.adapter == "ia3":
            return IA3Config(target_modules=paths, feedforward_modules=[])
        alpha: Any = 2 * self.rank if self.alpha is None else self.alpha
        rank = self.rank if rank is None else rank
        return LoraConfig(r=rank, lora_alpha=alpha * rank / self.rank, target_modules=paths, lora_dropout=0.0)


class PeftAdapters:
    """A model with named PEFT adapters, and a head a task where the model classifies."""

    def __init__(self, model: nn.Module, config: PeftMethodConfig) -> None:
        self.config = config
        self.context = TaskContext()
        self.paths = find_targets(model, config.target_modules)
        model.requires_grad_(False)
        self.head: TaskHead | None = install_head(model, self.context, config.head_norm)
        self.base = model
        self.model: nn.Module = model

    def add(self, adapter: str, seed_name: str, rank: int | None = None) -> None:
        """Add an adapter, of LoRA's `rank` where it is not the config's, and make it the active, trainable one."""
        devices = [
            device.index
            for device in {parameter.device for parameter in self.base.parameters()}
            if device.type == "cuda"
        ]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(stable_seed(self.config.seed, "adapter", seed_name))
            if isinstance(self.model, PeftModel):
                self.model.add_adapter(adapter, self.config.peft(self.paths, rank))
            else:
                self.model = get_peft_model(self.base, self.config.peft(self.paths, rank), adapter_name=adapter)
        self.activate(adapter, train=True)

    def activate(self, adapter: str, train: bool) -> None:
        """Answer with `adapter`; its parameters are trainable only in training."""
        assert isinstance(self.model, PeftModel)
        self.model.set_adapter(adapter)
        if not train:
            self.freeze()

    def freeze(self) -> None:
        """Take every parameter but an open head's out of training."""
        for name, parameter in self.model.named_parameters():
            if not name.endswith(("classifier.weight", "classifier.bias", "score.weight")):
                parameter.requires_grad_(False)

    def open_head(self, task: int, num_labels: int | None) -> None:
        """Give a task its head, where the model has heads."""
        self.context.open_task, self.context.groups = task, (Group(task),)
        if self.head is not None:
            assert num_labels is not None
            generator = torch.Generator().manual_seed(stable_seed(self.config.seed, task, "head"))
            self.head.open(task, num_labels, generator)
            self.set_labels(task)

    def close_head(self, task: int) -> None:
        """Freeze the open task's head."""
        if self.head is not None:
            self.head.close(task)
        self.context.open_task, self.context.groups = None, ()

    def set_labels(self, task: int) -> None:
        """Sequence classifiers reshape their logits by num_labels when they compute the loss."""
        if self.head is not None:
            self.base.num_labels = self.base.config.num_labels = self.head.labels[task]  # type: ignore[union-attr, assignment]

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """An adapter under PEFT's own names."""
        return {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in get_peft_model_state_dict(self.model, adapter_name=adapter).items()
        }

    def head_tensors(self, task: int) -> dict[str, Tensor]:
        """A task's head as `head.weight` and `head.bias`."""
        if self.head is None:
            return {}
        weight, bias = self.head.parts(task)
        return {HEAD + "weight": weight.detach().cpu(), HEAD + "bias": bias.detach().cpu()}

    def load_adapter(self, adapter: str, seed_name: str, tensors: dict[str, Tensor]) -> None:
        """Add an adapter from what `tensors` gave."""
        self.add(adapter, seed_name, rank_of(tensors) if self.config.adapter == "lora" else None)
        set_peft_model_state_dict(
            self.model,
            {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)},
            adapter_name=adapter,
        )
        self.freeze()

    def replace(self, adapter: str, seed_name: str, tensors: dict[str, Tensor]) -> None:
        """Put an adapter's tensors in the place of those it has, which may be of another rank."""
        assert isinstance(self.model, PeftModel)
        self.model.delete_adapter(adapter)
        self.load_adapter(adapter, seed_name, tensors)

    @property
    def bytes_per_rank(self) -> int:
        """Bytes of one rank component of LoRA at all linear maps, in float32."""
        return sum(4 * sum(linear_shape(self.base.get_submodule(path))) for path in self.paths)

    def load_head(self, task: int, tensors: dict[str, Tensor]) -> None:
        """Take a head back from what `head_tensors` gave."""
        if self.head is not None:
            self.head.load(task, tensors[HEAD + "weight"], tensors[HEAD + "bias"])
