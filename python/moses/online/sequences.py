"""A stream as one row of sequences, one domain's after another's, with the domains kept apart from what learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import TrainConfig
from ..errors import StreamError
from ..stream.prompt import Kind, encode_train
from ..stream.task import Example, Stream
from ..stream.text import packed

Visit = tuple[str, int]
"""A domain and how many sequences it has in this visit."""


def concatenated(stream: Stream, visits: Sequence[str]) -> tuple[list[Example], list[Visit]]:
    """The training examples in the order of the visits, each once; a domain visited k times is cut into k parts.

    Raises:
        StreamError: a domain that the stream does not have, or one with fewer examples than visits.
    """
    tasks = {task.name: task for task in stream.tasks}
    examples: list[Example] = []
    lengths: list[Visit] = []
    for place, name in enumerate(visits):
        if name not in tasks:
            raise StreamError(
                f"{name!r} is no domain of stream {stream.name!r}; it has {', '.join(tasks)}", code="unknown_task"
            )
        rows, times, turn = tasks[name].train, visits.count(name), visits[:place].count(name)
        part = rows[turn * len(rows) // times : (turn + 1) * len(rows) // times]
        if not part:
            raise StreamError(
                f"{name!r} is visited {times} times and has {len(rows)} examples; visit it less often",
                code="too_few_rows",
            )
        examples += part
        lengths.append((name, len(part)))
    return examples, lengths


def encoded(tokenizer: Any, example: Example, config: TrainConfig, kind: Kind) -> list[dict[str, Any]]:
    """The rows of one sequence: an answer behind its prompt is one, a long text may be several."""
    if not example.prompt:
        return packed(tokenizer, [example.answer], config.max_length)
    return [encode_train(tokenizer, example, config.max_length, kind, template=config.template)]
