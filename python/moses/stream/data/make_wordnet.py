"""Cut wordnet.json from the database files of WordNet 3.0 (Debian's package wordnet-base puts them into
/usr/share/wordnet).

    python make_wordnet.py /usr/share/wordnet > wordnet.json

Writes {"nouns": {topic: [[word, gloss], ...]}, "verbs": ...}: for each class the definitions with the smallest SHA-256
among those that are short, plain, of one sense only, and that do not name a class themselves.
"""

import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

PER_CLASS = 90
# numbers of WordNet's lexicographer files (lexnames(5)) -> the word that stands in the options
NOUNS = {5: "animal", 6: "artifact", 8: "body", 13: "food", 15: "place", 18: "person", 20: "plant", 27: "substance"}
VERBS = {30: "change", 31: "thinking", 32: "communication", 35: "contact", 37: "emotion", 38: "motion"}


def definitions(path: Path, classes: dict[int, str]) -> dict[str, list[list[str]]]:
    """The sample of one of WordNet's files: class -> [[word, gloss], ...]."""
    found = []
    for line in path.read_text().splitlines():
        if line.startswith("  "):  # the licence
            continue
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        if int(fields[1]) in classes:
            word = re.sub(r"\(.*\)$", "", fields[4]).replace("_", " ")
            found.append((classes[int(fields[1])], word, gloss.split('; "')[0].strip()))
    count_of = Counter(gloss for _, _, gloss in found) + Counter(word for _, word, _ in found)
    names = re.compile(rf"\b({'|'.join(classes.values())})s?\b|\bgenus\b|\bfamily\b|\d|trade name|^\(|[^ -~]")
    unwelcome = re.compile(
        r"offensive|disparag|slur|sex|genital|negro|obscen|vulgar|prostitut|slave|vagin|penis|uter|breast|nazi|rape\b",
        re.IGNORECASE,
    )
    kept: dict[str, list[list[str]]] = {name: [] for name in sorted(classes.values())}
    for name, word, gloss in sorted(found, key=lambda entry: hashlib.sha256("\n".join(entry).encode()).digest()):
        short = 25 <= len(gloss) <= 110 and len(gloss.split()) >= 5
        one_sense = count_of[gloss] == count_of[word] == 1
        plain = (
            (word.islower() or name == "place") and not names.search(gloss) and not unwelcome.search(f"{word} {gloss}")
        )
        if short and one_sense and plain and len(kept[name]) < PER_CLASS:
            kept[name].append([word, gloss])
    return kept


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sample = {"nouns": definitions(folder / "data.noun", NOUNS), "verbs": definitions(folder / "data.verb", VERBS)}
    print(json.dumps(sample, indent=0))
