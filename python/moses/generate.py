"""Answers one prompt with a run, and says which task it was taken for."""

from __future__ import annotations

from os import PathLike
from typing import Any

from .errors import RunError
from .session import open_session


def answer(path: str | PathLike[str], task: str | None, prompt: str) -> dict[str, Any]:
    """Answer `prompt` with task `task` of a run; None or "auto" infers the task from the prompt.

    Returns:
        {"task": the task's name, or None for the base model, "task_probability": of that task, or None where it was given, "answer"}.

    Raises:
        RunError: the run has no such task.
    """
    with open_session(path) as session:
        registry = session.method.registry
        probability = None
        if task is None or task == "auto":
            found = session.identifier.predict(session.features([prompt]))
            probability = float(found.probabilities.max())
            names = {info.id: info.name for info in registry.tasks()}
            name = None if bool(found.unknown[0]) else names[int(found.task_ids[0])]
        else:
            name = task
            if name not in session.ended:
                raise RunError(
                    f"{path}: has no trained task {name!r}; it has {', '.join(sorted(session.ended)) or 'none'}",
                    code="unknown_task",
                )
        return {"task": name, "task_probability": probability, "answer": session.answer(name, prompt)}
