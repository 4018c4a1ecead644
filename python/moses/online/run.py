"""One pass over a stream whose boundaries nobody gives: segments are opened, ended and recognised by the drift detector.

A segment begins with its first sequences held back until the identifier has said whether they are of an earlier task. A new
task is trained a batch at a time; each sequence's features (of the base model) and loss (before it is learned) go to the
detector first. Where it finds a change, the task ends with what came before, and the next segment begins where the change
did: the few sequences between the change and its discovery are learned again there. An earlier task that comes back answers
for its segment as it is, for what has ended is frozen.

Guarantee: a segment's end is one commit, and the next segment depends on nothing but what is committed, so that a run that
was interrupted ends in the same results.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import set_seed

from ..seeds import stable_seed
from ..session import Session, Views
from ..stream.drift import DriftDetector, recognise, score_changes
from ..stream.identify import TaskIdentifier, prompt_views
from .config import OnlineConfig
from .learner import Row, SegmentLearner, SegmentReader
from .sequences import concatenated, encoded

PREFIX = "segment-"


def run_online(session: Session, config: OnlineConfig) -> None:
    """Learn the stream of an open session, evaluate it, and commit both."""
    session.evaluate_base()
    OnlineRun(session, config).run()
    session.evaluate_segments()


class OnlineRun:
    """A run on its way through the stream."""

    def __init__(self, session: Session, config: OnlineConfig) -> None:
        self.session, self.config = session, config
        self.examples, self.visits = concatenated(session.stream, config.visits)
        self.features: dict[int, NDArray[Any]] = {}
        self.done = session.done.online
        self.done.setdefault("position", 0)
        for part in ("segments", "alarms"):
            self.done.setdefault(part, [])
        self.done.setdefault("dismissed", 0)

    def run(self) -> None:
        """Read on from the last commit to the end of the stream."""
        while self.done["position"] < len(self.examples):
            seconds = time.monotonic()
            self._segment(self.done["position"])
            self.session.add_seconds("train", time.monotonic() - seconds)
        self._score()

    # -- segments ------------------------------------------------------------------------------------------------------

    def _segment(self, start: int) -> None:
        session, drift = self.session, self.config.drift
        opening = self._features(start, start + drift.opening)
        known = recognise(session.identifier, opening, drift)
        if known is None:
            self._learn_segment(start, f"{PREFIX}{1 + sum(not part['returned'] for part in self.done['segments'])}")
        else:
            names = {info.id: info.name for info in session.method.registry.tasks()}
            self._watch_segment(start, names[known])

    def _learn_segment(self, start: int, name: str) -> None:
        session, method = self.session, self.session.method
        set_seed(stable_seed(session.train_config.seed, "segment", start) % 2**32)
        probe = [row for part in self._rows(start, start + self.config.drift.opening) for row in part]
        similar = session.donor(probe) if method.reads_similar else None
        method.see_task(probe)
        session.make_room(name)
        method.begin_task(name, None, None, similar)
        steps = math.ceil(self.config.horizon / session.train_config.batch_size)
        learner = SegmentLearner(method, session.tokenizer, session.kind, session.train_config, steps)
        stop, losses = self._read(start, name, learner)
        method.end_task(name)
        views = self._views(start, stop)
        self._note(start, stop, name, losses, returned=False)
        session.commit_task(name, views, similar)

    def _watch_segment(self, start: int, name: str) -> None:
        session = self.session
        reader = SegmentReader(session.method, session.tokenizer, session.kind, session.train_config)
        with session.method.answer(name):
            stop, losses = self._read(start, name, reader)
        self._note(start, stop, name, losses, returned=True)
        session.commit_progress()

    def _read(self, start: int, name: str, reader: SegmentReader) -> tuple[int, list[float]]:
        """Read from `start` to where the segment ends, and learn it, if `reader` learns; the end, and the loss of each sequence."""
        session, config = self.session, self.config
        learner = reader if isinstance(reader, SegmentLearner) else None
        size, detector, losses = session.train_config.batch_size, DriftDetector(config.drift), []
        with session.progress.phase(f"{name} from sequence {start}", total=len(self.examples)) as phase:
            for first in range(start, len(self.examples), size):
                stop = min(first + size, len(self.examples))
                rows, features = self._rows(first, stop), self._features(first, stop)
                losses += reader.losses(rows)
                for place in range(first, stop):
                    if not detector.update(features[place - first], losses[place - start]):
                        continue
                    change = start + (detector.change or 0)
                    if self._is_change(start, change, name, learner is not None):
                        self.done["alarms"].append({"read": place + 1, "signal": detector.signal, "began": change})
                        if learner is not None and change > first:
                            learner.step([row for part in rows[: change - first] for row in part])
                        return change, losses[: change - start]
                    self.done["dismissed"] += 1
                    detector.dismiss()
                if learner is not None:
                    learner.step([row for part in rows for row in part])
                phase.update(stop, loss=float(np.mean(losses[-size:])))
        return len(self.examples), losses

    def _is_change(self, start: int, change: int, name: str, is_open: bool) -> bool:
        """Whether what comes from `change` on is not, by the identifier, the segment's own task."""
        identifier, registry = self.session.identifier, self.session.method.registry
        task = registry.task(name).id
        if is_open:  # the open task is not in the identifier yet
            known = identifier
            identifier = TaskIdentifier(known.config, known.feature_dim)
            for other in known.task_ids:
                identifier.load_task_state(other, known.task_state(other))
            identifier.add_task(task, self._features(start, change))
        window = self._features(change, change + self.config.drift.opening)
        return recognise(identifier, window, self.config.drift) != task

    def _note(self, start: int, stop: int, name: str, losses: list[float], returned: bool) -> None:
        self.done["position"] = stop
        self.done["segments"].append(
            {"start": start, "stop": stop, "task": name, "returned": returned, "online_loss": float(np.mean(losses))}
        )
        self.session.progress.say(f"{name}: sequences {start} to {stop}{', recognised' if returned else ''}")

    # -- sequences -----------------------------------------------------------------------------------------------------

    def _features(self, start: int, stop: int) -> NDArray[Any]:
        """(sequences, 2, D) of the base model, each computed once."""
        places = range(start, min(stop, len(self.examples)))
        missing = [place for place in places if place not in self.features]
        if missing:
            found = self.session.features([self.examples[place].shown for place in missing])
            self.features |= zip(missing, found.numpy(), strict=True)
        for old in [place for place in self.features if place < self.done["position"]]:
            del self.features[old]
        return np.stack([self.features[place] for place in places])

    def _rows(self, start: int, stop: int) -> list[list[Row]]:
        session = self.session
        return [
            encoded(session.tokenizer, example, session.train_config, session.kind)
            for example in self.examples[start:stop]
        ]

    def _views(self, start: int, stop: int) -> Views:
        texts, prompt_ids = prompt_views([example.shown for example in self.examples[start:stop]])
        whole = torch.from_numpy(self._features(start, stop))
        others = texts[stop - start :]
        return Views(torch.cat([whole, self.session.features(others)]) if others else whole, prompt_ids)

    # -- scoring: here alone are the domains looked at -----------------------------------------------------------------

    def _score(self) -> None:
        segments = [(part["start"], part["task"]) for part in self.done["segments"]]
        alarms = [alarm["read"] for alarm in self.done["alarms"]]
        score = score_changes(self.visits, alarms, segments)
        counts: dict[str, dict[str, int]] = {}
        place = 0
        for domain, length in self.visits:
            for part in self.done["segments"]:
                shared = min(place + length, part["stop"]) - max(place, part["start"])
                if shared > 0:
                    mine = counts.setdefault(domain, {})
                    mine[part["task"]] = mine.get(part["task"], 0) + shared
            place += length
        domains = {domain: max(mine, key=lambda task: mine[task]) for domain, mine in counts.items()}
        self.done |= {"visits": self.visits, "score": score.to_json(), "domains": domains, "finished": True}
