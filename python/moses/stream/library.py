"""Three tasks cut from the source of Python's own standard library (PSF licence), read where it is installed.

Next line of a function (edit similarity, as TRACE's Py150), the exception that a `raise` names (accuracy), a function's
summary from its body (ROUGE-L). Guarantees: the same Python gives the same examples on any machine; a module gives to
one split only, and to the same split in every Python; no prompt occurs twice.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moses.errors import StreamError
from moses.stream.balance import balanced, stable_hash
from moses.stream.task import Example, Task

EXCEPTIONS = ("KeyError", "OSError", "RuntimeError", "TypeError", "ValueError")

_MAX_CODE = 220  # characters of code in a prompt: some 70 tokens
_MIN_TARGET, _MAX_TARGET = 10, 60  # characters of a line to complete
_MIN_WORDS, _MAX_WORDS = 4, 14  # words of a summary
_MAX_PER_MODULE = 12  # examples of one module in one split, so that no long module rules a task

# modules that every supported Python has (3.11 to 3.14), so that examples differ little between them
_MODULES = """
_collections_abc _markupbase _pydecimal _pyio _strptime _threading_local _weakrefset abc argparse ast base64 bdb bisect
bz2 calendar cmd code codecs codeop colorsys compileall configparser contextlib copy copyreg csv dataclasses datetime
difflib dis doctest enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext glob
graphlib gzip hashlib heapq hmac imaplib inspect io ipaddress linecache locale lzma mailbox mimetypes modulefinder netrc
ntpath numbers operator optparse os pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile
pstats pty py_compile pyclbr pydoc queue quopri random reprlib rlcompleter runpy sched secrets selectors shelve shlex
shutil signal site smtplib socket socketserver ssl stat statistics string stringprep struct subprocess symtable tabnanny
tarfile tempfile textwrap threading timeit tokenize trace traceback tracemalloc tty types typing uuid warnings wave
weakref webbrowser zipapp zipimport asyncio collections concurrent ctypes curses dbm email html http importlib json
logging multiprocessing re sqlite3 tomllib unittest urllib wsgiref xml xmlrpc zoneinfo
"""


@dataclass(frozen=True, slots=True)
class _Candidate:
    module: str
    label: str  # what is balanced: the answer of a classification task, "" elsewhere
    example: Example


@dataclass(frozen=True, slots=True)
class _Function:
    module: str
    lines: list[str]  # of the module
    node: ast.FunctionDef
    docstring: str | None
    statements: list[ast.stmt]  # itself and all inside of it


def library_tasks(names: Sequence[str], sizes: tuple[int, int, int]) -> dict[str, Task]:
    """Those of the tasks `nextline`, `exception` and `docstring`, of at most the given numbers of train, eval and test
    examples."""
    found: dict[str, list[_Candidate]] = {"nextline": [], "exception": [], "docstring": []}
    for function in _functions():
        found["nextline"] += _next_lines(function)
        found["exception"] += _exceptions(function)
        found["docstring"] += _summaries(function)
    metrics = {"nextline": "edit_similarity", "exception": "accuracy", "docstring": "rouge_l"}
    return {name: _task(name, metrics[name], found[name], sizes) for name in names}


def stdlib_code() -> dict[str, str]:
    """Module's path -> its source without docstrings, of a quarter of the modules that every supported Python has."""
    return {module: "\n".join(_without_docstrings(lines, tree)) for module, lines, tree in _sources("0123")}


def _sources(endings: str = "0123456789abcdef") -> Iterator[tuple[str, list[str], ast.Module]]:
    """(path, lines, tree) of the modules, those whose path's hash ends in one of these digits: there is more than is wanted."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for name in _MODULES.split() for file in (root / f"{name}.py", *sorted((root / name).rglob("*.py")))]
    for file in files:
        module = file.relative_to(root).as_posix()
        if not file.is_file() or "test" in file.parts or stable_hash(module)[-1] not in endings:
            continue
        with tokenize.open(file) as handle:
            text = handle.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library's own: a backslash in an old docstring
            tree = ast.parse(text)
        yield module, text.splitlines(), tree


def _without_docstrings(lines: list[str], tree: ast.Module) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    dropped: set[int] = set()
    for node in (tree, *_statements(tree)):
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            dropped |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return [line for number, line in enumerate(lines, 1) if number not in dropped]


def _functions() -> Iterator[_Function]:
    for module, lines, tree in _sources():
        for node in _statements(tree):
            if isinstance(node, ast.FunctionDef):
                yield _Function(module, lines, node, ast.get_docstring(node), [node, *_statements(node)])


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """All statements inside of a node; ast.walk would also visit every expression, which are most of the nodes."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for inner in getattr(node, field, ()):
            if isinstance(inner, ast.stmt):
                yield inner
            yield from _statements(inner)


def _next_lines(function: _Function) -> Iterator[_Candidate]:
    lines = function.lines
    for node in function.statements:
        if isinstance(node, (ast.If, ast.For, ast.While, ast.With)):
            single = lines[node.lineno - 1].endswith(":")
        else:
            single = (
                isinstance(node, (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)) and node.lineno == node.end_lineno
            )
        if not single:
            continue
        target = lines[node.lineno - 1].strip()
        # there are far more lines than are wanted: one in eight is looked at
        if not _MIN_TARGET <= len(target) <= _MAX_TARGET or stable_hash(target)[0] not in "01":
            continue
        context = _context(function, node.lineno - 6, node.lineno - 1, minimum=3)
        if context:
            prompt = f"Write the next line of this Python code.\n{context}\nNext line:"
            yield _Candidate(function.module, "", Example(prompt, target))


def _exceptions(function: _Function) -> Iterator[_Candidate]:
    for node in function.statements:
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)):
            continue
        name = node.exc.func.id
        if name not in EXCEPTIONS or not node.exc.args:
            continue
        context = _context(function, node.lineno - 4, node.end_lineno or node.lineno, minimum=2)
        if context.count(name) == 1 and f"raise {name}" in context:
            code = context.replace(f"raise {name}", "raise ___")
            prompt = (
                f"Which exception stands at ___ in this Python code?\nOptions: {', '.join(EXCEPTIONS)}\n{code}\nAnswer:"
            )
            yield _Candidate(function.module, name, Example(prompt, name))


def _summaries(function: _Function) -> Iterator[_Candidate]:
    body = function.node.body
    if not function.docstring or len(body) < 2:
        return
    summary = " ".join(function.docstring.split("\n\n")[0].split())
    summary = summary.split(". ")[0].rstrip(".")
    if (
        not _MIN_WORDS <= len(summary.split()) <= _MAX_WORDS
        or not summary[0].isupper()
        or not summary.isascii()
        or "->" in summary
    ):
        return
    head = function.lines[function.node.lineno - 1 : body[0].lineno - 1]
    rest = function.lines[(body[0].end_lineno or 0) : function.node.end_lineno]
    code = textwrap.dedent("\n".join(line for line in head + rest if line.strip()))
    if len(code) <= _MAX_CODE and "NotImplementedError" not in code:  # what is not there cannot be summarised
        prompt = f"Say in one sentence what this Python function does.\n{code}\nSummary:"
        yield _Candidate(function.module, "", Example(prompt, summary))


def _context(function: _Function, first: int, last: int, minimum: int) -> str:
    """Code from a statement in `first` to `last` (from 1, inclusive), as much as fits; "" where it is under `minimum`
    lines.

    The statement is the earliest that is not indented deeper than what follows; blank lines and comments are left out.
    """
    starts = {statement.lineno for statement in function.statements}
    if function.docstring is not None:
        starts.discard(function.node.body[0].lineno)
    for start in sorted(start for start in starts if first <= start <= last):
        kept = [line for line in function.lines[start - 1 : last] if line.strip() and not line.lstrip().startswith("#")]
        indents = [len(line) - len(line.lstrip()) for line in kept]
        code = textwrap.dedent("\n".join(kept))
        if len(kept) < minimum:
            return ""
        if len(code) <= _MAX_CODE and indents[0] == min(indents):
            odd = "\t" in code or '"""' in code or "'''" in code or not code.isascii()
            return "" if odd else code
    return ""


def _task(name: str, metric: str, candidates: list[_Candidate], sizes: tuple[int, int, int]) -> Task:
    seen: set[str] = set()
    splits: dict[str, list[_Candidate]] = {"train": [], "eval": [], "test": []}
    for candidate in sorted(candidates, key=lambda candidate: stable_hash(candidate.example.prompt)):
        if candidate.example.prompt not in seen:
            seen.add(candidate.example.prompt)
            splits[split_of(candidate.module)].append(candidate)
    train, evaluation, test = (_choose(splits[split], size) for split, size in zip(splits, sizes, strict=True))
    if not (train and evaluation and test):
        raise StreamError(
            f"too little of the source of Python's library in {sysconfig.get_path('stdlib')}: install a full Python",
            code="no_library",
        )
    return Task(name, train, evaluation, test, metric)


def _choose(candidates: list[_Candidate], size: int) -> tuple[Example, ...]:
    by_label: dict[str, list[Example]] = {}
    per_module: dict[str, int] = {}
    for candidate in candidates:
        per_module[candidate.module] = per_module.get(candidate.module, 0) + 1
        if per_module[candidate.module] <= _MAX_PER_MODULE:
            by_label.setdefault(candidate.label, []).append(candidate.example)
    return balanced(by_label, size)


def split_of(document: str) -> str:
    """`train`, `eval` or `test` of a module or another document, from the hash of its name: 68, 13 and 19 in a hundred."""
    share = int(stable_hash(document)[:8], 16) % 100
    return "train" if share < 68 else "eval" if share < 81 else "test"
