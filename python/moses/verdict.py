"""What a check found: problems, each with its place and its mend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from moses.errors import MosesError

COPY = "restore it from a copy"
"""How most damage is mended."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, what, and how to mend it. `code` is stable."""

    file: str
    code: str
    problem: str
    mend: str

    def as_dict(self) -> dict[str, str]:
        """The problem for JSON."""
        return {"file": self.file, "code": self.code, "problem": self.problem, "mend": self.mend}


@dataclass
class Verdict:
    """What was looked at and what was found.

    `tasks`: each one's id, name, recomputed content hash and, against another run, whether it is `identical`.
    """

    path: str
    kind: str
    against: str | None = None
    generation: int | None = None
    num_files: int = 0
    tasks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, file: str | Path, code: str, problem: str, mend: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(str(file), code, problem, mend))

    def caught(self, file: str | Path, work: Callable[[], T]) -> T | None:
        """Do something, and note what it raises as a problem of that file; the result is None then."""
        try:
            return work()
        except MosesError as error:
            self.problems.append(problem_of(file, error.code, str(error)))
        except OSError as error:
            self.add(error.filename or file, "unreadable", error.strerror or str(error), "make it readable, or " + COPY)
        return None

    def as_dict(self) -> dict[str, Any]:
        """The verdict for JSON."""
        return {
            "path": self.path,
            "kind": self.kind,
            "against": self.against,
            "ok": self.ok,
            "generation": self.generation,
            "num_files": self.num_files,
            "tasks": self.tasks,
            "notes": self.notes,
            "problems": [problem.as_dict() for problem in self.problems],
        }


def problem_of(file: str | Path, code: str, message: str) -> Problem:
    """A problem from an error's message, whose mend stands behind its last semicolon, or else its last colon."""
    what, _, mend = message.rpartition("; ")
    if not what:
        what, _, mend = message.rpartition(": ")
    what = what.removeprefix(f"{file}: ")
    return Problem(str(file), code, what or message, mend if what else COPY)
