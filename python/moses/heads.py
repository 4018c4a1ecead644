"""One classification head a task, for models without a language-model head.

The head stands where the model's own classifier was; ended tasks' heads are buffers. What reaches it is brought to zero mean and
unit variance first: an encoder whose pooler was never trained hands on features of a hundredth of that (MiniLM's sentence
encoder: 0.02), and every task would spend its steps on making its head's weights large. A batch of several tasks gets
logits as wide as its widest head, with minus infinity beyond each row's own labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .context import TaskContext
from .errors import ModelError

# Where sequence classifiers of transformers keep the linear map that gives the logits.
_PATHS = ("classifier", "score", "classifier.out_proj", "classification_head.out_proj")


class TaskHead(nn.Module):
    """Heads of all tasks over `dim` features: weights (labels, dim) and biases (labels,), float32.

    `normalise`: whether features are brought to zero mean and unit variance; runs from before it was done have none.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, dim: int, context: TaskContext, path: str, original: nn.Linear, normalise: bool) -> None:
        super().__init__()
        self.dim, self.context, self.normalise = dim, context, normalise
        # Not a child: the model's own head takes no part until `detach` puts it back at `path`.
        self.replaced = (path, (original,))
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.labels: dict[int, int] = {}

    def open(self, task: int, num_labels: int, generator: torch.Generator) -> None:
        """Give the open task a head: weights normal with deviation 0.02 (BERT's), biases zero."""
        self.labels[task] = num_labels
        self.weight = nn.Parameter(torch.randn(num_labels, self.dim, generator=generator) * 0.02)
        self.bias = nn.Parameter(torch.zeros(num_labels))

    def close(self, task: int) -> None:
        """Freeze the open task's head."""
        assert self.weight is not None and self.bias is not None, "the head has no open task"
        weight, bias = self.weight.detach(), self.bias.detach()
        self.drop(task)
        self.load(task, weight, bias)

    def drop(self, task: int) -> None:
        """Give up the open task's head."""
        self.weight = self.bias = None
        self.labels.pop(task, None)

    def load(self, task: int, weight: Tensor, bias: Tensor) -> None:
        """Set `task`'s frozen head."""
        self.labels[task] = weight.shape[0]
        self.register_buffer(f"weight_{task}", weight.clone())
        self.register_buffer(f"bias_{task}", bias.clone())

    def forget(self, task: int) -> None:
        """Remove `task`'s head."""
        del self.labels[task]
        delattr(self, f"weight_{task}")
        delattr(self, f"bias_{task}")

    def parts(self, task: int) -> tuple[Tensor, Tensor]:
        """Weight (labels, dim) and bias (labels,) of `task`, in training or not."""
        if task == self.context.open_task:
            assert self.weight is not None and self.bias is not None, "the head has no open task"
            return self.weight, self.bias
        return getattr(self, f"weight_{task}"), getattr(self, f"bias_{task}")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, ..., dim) to logits (batch, ..., labels).

        Raises:
            ModelError: no task is active, and so there is no head.
        """
        groups = self.context.groups
        if self.normalise:
            x = F.layer_norm(x.float(), (self.dim,)).to(x.dtype)
        if not groups:
            raise ModelError(
                "no task is active, and a model with a head a task has none of its own; use `with model.task(...)`",
                code="no_task",
            )
        if groups[0].rows is None:
            return self._linear(x, groups[0].task)
        logits = x.new_full((*x.shape[:-1], max(self.labels[group.task] for group in groups)), float("-inf"))
        for group in groups:
            part = self._linear(group.take(x), group.task)
            part = F.pad(part, (0, logits.shape[-1] - part.shape[-1]), value=float("-inf"))
            logits = logits.index_copy(0, group.rows.to(x.device), part.to(logits.dtype))  # type: ignore[union-attr]
        return logits

    def _linear(self, x: Tensor, task: int) -> Tensor:
        weight, bias = self.parts(task)
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def install_head(model: nn.Module, context: TaskContext, normalise: bool) -> TaskHead | None:
    """Put a `TaskHead` where the model's sequence classifier is; None for a model of another kind."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return None
    for path in _PATHS:
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(module, nn.Linear):
            head = TaskHead(module.in_features, context, path, module, normalise)
            model.set_submodule(path, head)
            return head
    raise ModelError(
        f"do not know where {type(model).__name__} keeps its classifier; looked for a linear map at {', '.join(_PATHS)}",
        code="unknown_architecture",
    )
