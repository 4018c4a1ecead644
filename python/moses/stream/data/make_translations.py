"""Cut translations.json.gz from texts in several languages in packages of Debian 12.

    apt-get download passwd login xz-utils debconf-doc postgresql-15
    for package in *.deb; do dpkg-deb -x $package root; done
    python make_translations.py root translations.json.gz

Writes {language: {document: text}}: manual pages as man(1) renders them, with a paragraph a line and paragraphs apart by
blank lines; and the longer messages of PostgreSQL's server, forty a document. A page, and a message, is in the same
document in every language. What a translation has left in English is cut, and so are XZ's pages that come from gzip, which
have another licence.
"""

import gettext
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

LANGUAGES = {"de": "german", "fr": "french", "ja": "japanese", "ru": "russian"}
FROM_GZIP = ("xzdiff", "xzgrep", "xzless", "xzmore")
MIN_MESSAGE = 60  # characters in English: sentences, not fragments
MESSAGES_A_DOCUMENT = 40


def pages(root: Path, code: str) -> list[Path]:
    """The manual pages of a language, links apart."""
    found = (root / "usr/share/man" / code).glob("man?/*.gz")
    return sorted(path for path in found if not path.is_symlink() and not path.name.startswith(FROM_GZIP))


def paragraphs(path: Path) -> list[str]:
    """The page without its head and foot; no line is broken, hyphenated or indented."""
    environment = {**os.environ, "MANWIDTH": "4000", "LC_ALL": "C.UTF-8"}
    man = ["man", "--nh", "--nj", "-P", "cat", "-E", "UTF-8", "-l", str(path.resolve())]
    rendered = subprocess.run(man, check=True, env=environment, capture_output=True).stdout
    plain = subprocess.run(["col", "-bx"], check=True, env=environment, input=rendered, stdout=subprocess.PIPE).stdout
    lines = [re.sub(r" {2,}", "  ", line.strip()) for line in plain.decode().splitlines()]
    body = lines[1:]
    while body and not body[-1]:
        body.pop()
    return [part for part in re.split(r"\n{2,}", "\n".join(body[:-1]).strip()) if part]


def is_english(text: str) -> bool:
    """Whether the words that no other of the languages has are there twice."""
    return len(re.findall(r"\b(?:the|of|is|and|with|be|will|by)\b", text.lower())) >= 2


def messages(root: Path) -> dict[str, dict[str, str]]:
    """{language: {English: translation}} of the server's messages."""
    found = {}
    for code, language in LANGUAGES.items():
        with (root / f"usr/share/locale/{code}/LC_MESSAGES/postgres-15.mo").open("rb") as file:
            catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
        found[language] = {
            key: value
            for key, value in catalog.items()
            if isinstance(key, str) and len(key) >= MIN_MESSAGE and value and value != key
        }
    return found


def main() -> None:
    """Write the sample to the file that is named."""
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    sample: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES.values()}
    for code, language in LANGUAGES.items():
        for path in pages(root, code):
            kept = [part for part in paragraphs(path) if not is_english(part)]
            sample[language][path.name.removesuffix(".gz")] = "\n\n".join(kept)
    translated = messages(root)
    english_messages = sorted(set().union(*translated.values()))
    for start in range(0, len(english_messages), MESSAGES_A_DOCUMENT):
        block = english_messages[start : start + MESSAGES_A_DOCUMENT]
        for language, known in translated.items():
            texts = [known[message].strip() for message in block if message in known]
            sample[language][f"messages-{start // MESSAGES_A_DOCUMENT:03d}"] = "\n\n".join(texts)
    text = json.dumps(sample, ensure_ascii=False, indent=0, sort_keys=True)
    out.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
