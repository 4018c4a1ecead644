"""Is a run folder whole, and are its frozen weights still, bit for bit, what they were? Needs no torch.

Nothing is believed that can be recomputed: the hash of every file, the hash of each task's weights, put together from
the files of those tasks that own them, and, against an older copy, the bits themselves.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from moses import _core, surgery
from moses.errors import FormatError, SurgeryError
from moses.frozen import check_tasks, compare_tasks
from moses.inspect import INDEX, MANIFEST, neither, open_run, read_json
from moses.report import PAGE, PICTURES, read_results
from moses.run_files import CONFIG, LOG, REGISTRY, RESULTS, TRAINER
from moses.surgery.checkpoint import MODEL_TYPES, RECORD, open_checkpoint
from moses.tensorfile import TensorFile
from moses.verdict import COPY, Verdict, problem_of

_STORE = (MANIFEST, ".lock", ".pending", ".manifest.tmp")
BESIDE = frozenset((*_STORE, RESULTS, LOG, PAGE, *PICTURES))
"""Files of a run folder that the manifest does not name."""


def verify_path(path: str | Path, against: str | Path | Sequence[str | Path] | None = None) -> Verdict:
    """Check a run folder, or a checkpoint's headers, index and experts; with `against`, also the bits of an older copy's tasks,
    or of the checkpoints that surgery made this one of.

    What is wrong with the content is in the verdict. Raises MosesError or OSError where `path` is nothing that can be
    checked (it is not there, it is no run), or `against` no run that can be compared with.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        if against is not None and not (path / CONFIG).exists():
            with _core.Store.open(path):  # says what is missing
                pass
        if against is not None:
            return _compare_checkpoint(path, [against] if isinstance(against, (str, Path)) else list(against))
        return _verify_checkpoint(path)
    if against is not None and not isinstance(against, (str, Path)):
        if len(against) > 1:
            raise SurgeryError(f"{path}: a run is compared with one copy; give --against once", code="bad_choice")
        against = against[0]
    verdict = Verdict(str(path), "run", None if against is None else str(against))
    try:
        store = _core.Store.open(path)
    except FormatError as error:
        verdict.problems.append(problem_of(path / MANIFEST, error.code, str(error)))
        return verdict
    with store:
        verdict.generation, verdict.num_files = store.generation, len(store.files())
        for name, code, message in store.verify():
            verdict.problems.append(problem_of(store.path(name), code, message))
        _check_folder(verdict, path, store)
    if (path / RESULTS).exists():
        verdict.caught(path / RESULTS, partial(read_results, path))
    if against is not None:
        with open_run(against):  # what cannot be compared with is a mistake of the caller's, not of this run
            pass
    verdict.caught(path, partial(_verify_tasks, verdict, path, against))
    return verdict


def _verify_tasks(verdict: Verdict, path: Path, against: str | Path | None) -> None:
    with open_run(path) as run:
        verdict.caught(run.store.path(REGISTRY), run.registry.validate)
        hashes = check_tasks(verdict, run)
        tasks = run.registry.tasks()
        verdict.tasks = [{"id": task.id, "name": task.name, "content_hash": hashes.get(task.id)} for task in tasks]
        if against is not None:
            compare_tasks(verdict, run, hashes, Path(against))


def _check_folder(verdict: Verdict, path: Path, store: _core.Store) -> None:
    """Nothing is there that neither the manifest names nor moses writes beside it."""
    expected = {info.path for info in store.files().values()}
    if (path / ".pending").exists():
        verdict.notes.append("a commit was interrupted: the next command that writes clears what it left")
        expected |= _pending(path)
    for name in _walk(path):
        inside = name.split("/", 1)[0]
        if (path / name).is_symlink():
            mend = "replace it by what it points to, or remove it"
            verdict.add(path / name, "link", "it is a link, and links are not part of a run", mend)
        elif name not in expected and name not in BESIDE and inside != TRAINER:
            verdict.add(path / name, "unexpected_file", "it is no part of the run", "move it away")


def _walk(path: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(path, followlinks=False):
        folders.sort()
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted(names + links):
            yield (Path(folder) / name).relative_to(path).as_posix()


def _pending(path: Path) -> set[str]:
    try:
        paths = read_json(path / ".pending", (path / ".pending").read_bytes()).get("paths")
    except (OSError, FormatError):
        return set()  # torn by a crash: nothing was written after it
    return {name for name in paths if isinstance(name, str)} if isinstance(paths, list) else set()


def _verify_checkpoint(path: Path) -> Verdict:
    """Every header is valid, and an index names exactly the tensors that the shards have."""
    verdict = Verdict(str(path), "checkpoint")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if path.is_dir() and not files:
        raise neither(path)
    if not path.is_dir():
        path.stat()  # FileNotFoundError, not a verdict, where nothing is there
    verdict.num_files = len(files)
    headers = {file.name: verdict.caught(file, partial(TensorFile.open, file)) for file in files}
    index = path / INDEX
    if path.is_dir() and index.is_file():
        document = verdict.caught(index, lambda: read_json(index, index.read_bytes()))
        if document is not None:
            _check_index(verdict, index, document.get("weight_map"), headers)
    config = path / CONFIG
    if path.is_dir() and config.is_file():
        document = verdict.caught(config, lambda: read_json(config, config.read_bytes()))
        if document is not None and document.get("model_type") in MODEL_TYPES and not verdict.problems:
            verdict.caught(path, partial(open_checkpoint, path))
    if path.is_dir() and (path / RECORD).is_file() and not verdict.problems:
        from moses.surgery.compare import changed_since_hashed

        for what, problem in verdict.caught(path / RECORD, partial(changed_since_hashed, path)) or []:
            verdict.add(path, "not_identical", f"{what}: {problem}", COPY)
    return verdict


def _compare_checkpoint(path: Path, sources: Sequence[str | Path]) -> Verdict:
    """Every kept tensor, expert and gate row is, bit for bit, that of the checkpoints it was made of."""
    verdict = Verdict(str(path), "checkpoint", ", ".join(map(str, sources)))
    if path.is_dir():
        verdict.num_files = len(list(path.glob("*.safetensors")))
    found = surgery.verify(path, sources)
    for what, problem in found.problems:
        verdict.add(path, "not_identical", f"{what}: {problem}", "run the surgery again")
    verdict.notes.append(
        f"{found.tensors} tensors, {found.experts} experts and {found.rows} gate rows are bit-identical; {found.new} experts are new"
    )
    return verdict


def _check_index(verdict: Verdict, index: Path, weight_map: object, headers: Mapping[str, TensorFile | None]) -> None:
    if not isinstance(weight_map, dict):
        verdict.add(index, "index_damaged", "it has no object 'weight_map'", COPY)
        return
    listed = {(name, str(shard)) for name, shard in weight_map.items()}
    there = {(name, shard) for shard, header in headers.items() if header for name in header.tensors}
    unread = {shard for shard, header in headers.items() if header is None}
    for name, shard in sorted(listed - there):
        if shard not in unread:
            what = f"it names the tensor {name!r} in {shard!r}, which is not there"
            verdict.add(index, "tensor_missing", what, "download the shard again")
    homes = {name: str(shard) for name, shard in weight_map.items()}
    hidden = 0
    for name, shard in sorted(there - listed):
        if homes.get(name, "") > shard:  # shards are read in the order of their names
            hidden += 1
            continue
        what = f"the index does not name its tensor {name!r}"
        verdict.add(index.parent / shard, "tensor_unlisted", what, "download the index again")
    if hidden:
        verdict.notes.append(
            f"{hidden} stale tensors are hidden by a later shard: surgery into another folder drops them"
        )
