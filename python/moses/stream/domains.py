"""The built-in stream `domains`: real texts of six domains far apart, to model and not to answer (metric `perplexity`).

English is the reference documentation that comes with Python (pydoc's topics), code is the source of its library without
docstrings; both are read where Python is installed (PSF licence). German, French, Russian and Japanese are manual pages and
messages that ship with moses (data/LICENSE.translations). Guarantees: a document (topic, module, page) gives to one split only,
and to the same split in every Python and in every language; no paragraph of some length occurs twice in a domain; the same
Python gives the same passages on any machine.
"""

from __future__ import annotations

import gzip
import importlib
import json
import re
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources

from moses.errors import StreamError
from moses.stream.balance import spread, stable_hash
from moses.stream.library import split_of, stdlib_code
from moses.stream.task import TEXT_METRIC, Example, Task, text_example

PASSAGE_BYTES = 1500  # of a passage at most, where no line is longer: some 400 tokens of English
_MIN_REPEATED = 40  # characters of a paragraph that may not be there twice; headings may
_SPLITS = ("train", "eval", "test")


def domain_tasks(names: Sequence[str], sizes: tuple[int, int, int]) -> dict[str, Task]:
    """The domains of these names, of at most the given numbers of train, eval and test passages, spread over their texts."""
    return {name: _task(name, DOMAINS[name](), sizes) for name in names}


def passages(text: str, limit: int = PASSAGE_BYTES) -> list[str]:
    """The text in pieces of at most `limit` bytes of UTF-8, cut between paragraphs; a longer paragraph is cut at line ends, and
    a line that is longer stays whole."""
    pieces: list[str] = []
    for paragraph in re.split(r"\n{2,}", text.strip("\n")):
        if pieces and _bytes(pieces[-1]) + _bytes(paragraph) + 2 <= limit:
            pieces[-1] += "\n\n" + paragraph
        elif _bytes(paragraph) <= limit:
            pieces.append(paragraph)
        else:
            pieces += _lines(paragraph, limit)
    return [piece for piece in pieces if piece.strip()]


def _lines(paragraph: str, limit: int) -> list[str]:
    pieces: list[str] = []
    for line in paragraph.splitlines():
        if pieces and _bytes(pieces[-1]) + _bytes(line) + 1 <= limit:
            pieces[-1] += "\n" + line
        else:
            pieces.append(line)
    return pieces


def _bytes(text: str) -> int:
    return len(text.encode())


def _task(name: str, documents: Mapping[str, str], sizes: tuple[int, int, int]) -> Task:
    texts: dict[str, list[str]] = {split: [] for split in _SPLITS}
    seen: set[str] = set()
    for split in reversed(_SPLITS):  # what is in the test is nowhere else
        for document in sorted(documents, key=stable_hash):
            if split_of(document) == split:
                texts[split] += passages(_without_repeats(documents[document], seen))
    if not all(texts.values()):
        raise StreamError(f"domain {name}: its sources are not all there: install a full Python", code="no_library")
    train, evaluation, test = (_examples(texts[split], size) for split, size in zip(_SPLITS, sizes, strict=True))
    return Task(name, train, evaluation, test, TEXT_METRIC, domain=name)


def _without_repeats(text: str, seen: set[str]) -> str:
    kept = []
    for paragraph in re.split(r"\n{2,}", text.strip("\n")):
        bare = paragraph.strip()
        if len(bare) < _MIN_REPEATED or bare not in seen:
            kept.append(paragraph)
            seen.add(bare)
    return "\n\n".join(kept)


def _examples(texts: Sequence[str], size: int) -> tuple[Example, ...]:
    unique = list(dict.fromkeys(texts))
    return spread([text_example(text) for text in unique], size)


def _english() -> Mapping[str, str]:
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise StreamError(
            f"no documentation (pydoc_data) beside Python's library in {sysconfig.get_path('stdlib')}: "
            "install a full Python",
            code="no_library",
        ) from None
    return {name: "\n".join(line.strip() for line in text.splitlines()) for name, text in topics.items()}


def _translations(language: str) -> Callable[[], Mapping[str, str]]:
    return lambda: _sample()[language]


@cache
def _sample() -> dict[str, dict[str, str]]:
    data = resources.files("moses.stream").joinpath("data/translations.json.gz").read_bytes()
    sample: dict[str, dict[str, str]] = json.loads(gzip.decompress(data))
    return sample


DOMAINS: dict[str, Callable[[], Mapping[str, str]]] = {
    "english": _english,
    "code": stdlib_code,
    "german": _translations("german"),
    "french": _translations("french"),
    "russian": _translations("russian"),
    "japanese": _translations("japanese"),
}
"""Name -> the documents that it is cut from, by their names."""
