"""The layout follows the data in one direction: a module imports only from the layers before its own.

stream -> model -> router -> banks -> task face -> methods -> run folder -> evaluation -> training -> report -> command line.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import moses

ROOT = Path(moses.__file__).parent
LAYERS = (
    ("errors", "_core", "seeds", "run_files", "tensorfile", "ranks"),
    ("config",),
    ("surgery",),
    ("buffers", "cuda"),
    ("plan",),
    ("ops",),
    ("sari", "stream", "metrics"),
    ("models", "targets", "context"),
    ("routes", "loss"),
    ("routers", "experts"),
    ("moe", "transformers"),
    ("growth",),
    ("subexperts",),
    ("selection", "heads"),
    ("attached",),
    ("attachment", "giving_up"),
    ("methods",),
    ("run_config", "answers", "cheaper"),
    ("perplexity",),
    ("checkpoint", "results", "evaluate"),
    ("scratch", "donors", "progress", "report", "inspect", "frozen", "verdict", "verify", "doctor"),
    ("budget", "segments"),
    ("session",),
    ("online",),
    ("run_surgery", "run_extract", "training", "generate"),
    ("cli", "__main__"),
)
PLACE = {name: place for place, names in enumerate(LAYERS) for name in names}
# Calls that go up by design, inside a function: a method or a saved model starts a session of its own.
UPWARDS = {("evaluate", "session"), ("attached", "checkpoint"), ("models", "growth")}
SOURCES = sorted(path for path in ROOT.rglob("*.py") if "data" not in path.relative_to(ROOT).parts[:-1])


def top(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> set[str]:
    package = ["moses", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *((node.module or "").split(".") if node.module else [])]
            names = [".".join([*module, alias.name]) for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("moses.")}
    return {name for name in found if name in PLACE or (ROOT / name).exists() or (ROOT / f"{name}.py").exists()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    name = top(path)
    if name == "__init__":
        return
    assert name in PLACE, f"{name} has no layer: add it to LAYERS where its data is ready"
    for other in imports(path) - {name}:
        assert PLACE[other] <= PLACE[name] or (name, other) in UPWARDS, f"{name} imports {other}, which comes after it"


def test_stages_do_not_import_each_other_in_a_circle():
    for names in LAYERS:
        for name in names:
            mine = set().union(*(imports(path) for path in SOURCES if top(path) == name)) & set(names) - {name}
            for other in mine:
                theirs = set().union(*(imports(path) for path in SOURCES if top(path) == other))
                assert name not in theirs, f"{name} and {other} import each other"


def test_files_are_one_idea_long():
    long = [str(path.relative_to(ROOT)) for path in SOURCES if len(path.read_text().splitlines()) > 600]
    assert not long
