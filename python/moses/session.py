"""One run being made or read: its folder, method, stream, identifier, and the rows evaluated so far.

Everything that must survive a crash is committed to the store; what is only shown (results.json, log.jsonl) is written
beside it and can be made again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _core, ranks
from .answers import Answerer, TaskFormat, autocast
from .attached import MosesModel
from .budget import Budget, store_sizes, used_bytes
from .checkpoint import load_base, load_method, model_source, read_config, task_files
from .config import TrainConfig, from_settings, to_json
from .donors import DonorProbe
from .errors import ModelError, RunError, StreamError
from .evaluate import Evaluator, prompts
from .methods import Method, method_class
from .models import kind_of, load_model
from .progress import Progress
from .results import RunProgress, results_document, task_bytes
from .run_config import RunConfig, StreamSource
from .run_files import CONFIG, LOG, PROGRESS, REGISTRY, RESULTS, is_run
from .segments import SegmentMethod, check_online, segment_formats
from .stream import Stream, load_stream
from .stream.identify import IdentifierConfig, TaskIdentifier, prompt_features, prompt_views
from .stream.prompt import Kind, label_names
from .stream.task import Task
from .targets import hidden_size

_TEXT_TOKENS = 64  # of an answer by `generate` where tasks have no answers


@dataclass(frozen=True)
class Views:
    """Features (views, 2, D) of a task's prompts, and which prompt each is a view of."""

    features: Tensor
    prompt_ids: list[int]


@dataclass
class Session:
    """A run that is open for writing.

    Attributes:
        path: the run folder.
        store: its files.
        config: what the run was made from.
        method: the method with the model.
        tokenizer, kind: of the model.
        stream: the tasks.
        formats: how each task's answers are read off.
        identifier: infers tasks; fed by `commit_task`.
        train_config: as in `config`, typed.
        progress: where work is shown.
        done: rows and figures so far.
        budget: keeps the tasks' bytes below the run's budget; None is no limit.
    """

    path: Path
    store: _core.Store
    config: RunConfig
    method: Method
    tokenizer: Any
    kind: Kind
    stream: Stream
    formats: dict[str, TaskFormat]
    identifier: TaskIdentifier
    train_config: TrainConfig
    progress: Progress
    done: RunProgress
    budget: Budget | None = None
    _shrunk: list[str] = field(default_factory=list)  # tasks that gave something up for the open one

    @property
    def ended(self) -> set[str]:
        """Names of the tasks that are trained and committed."""
        return {info.name for info in self.method.registry.tasks() if info.state == "ended"}

    @property
    def finished(self) -> bool:
        """Whether the last task is trained and its row evaluated."""
        return len(self.done.rows) == (len(self.stream.tasks) if self.config.online is None else 1)

    @property
    def trained(self) -> list[str]:
        """Names of the stream's tasks that can be answered, in the stream's order."""
        known = self.ended if self.config.online is None else self.done.online.get("domains", {})
        return [task.name for task in self.stream.tasks if task.name in known]

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate_base(self) -> None:
        """Evaluate and commit R[0], unless that is done."""
        if self.done.base is not None:
            return
        columns = range(len(self.stream.tasks))
        with self._phase("evaluate base", columns, modes=1) as tick:
            self.done.base = self._evaluator().base_row(columns, tick)
        self.commit_progress()

    def evaluate_row(self, trained: Sequence[str]) -> None:
        """Evaluate and commit the row after the last task of `trained`, unless that is done."""
        number = len(trained)
        if len(self.done.rows) >= number:
            return
        last = number == len(self.stream.tasks)
        columns = (
            range(len(self.stream.tasks)) if last or self.train_config.eval_rows == "all" else range(number - 1, number)
        )
        row: dict[str, Any] = {"til": None, "tail": None, "confusion": None}
        evaluator = self._evaluator()
        modes = self.train_config.eval_modes
        with self._phase(f"evaluate {number}/{len(self.stream.tasks)} {trained[-1]}", columns, len(modes)) as tick:
            if "til" in modes:
                with self._counting(last):
                    row["til"] = evaluator.til_row(trained, columns, tick)
            if "tail" in modes:
                whole = last or self.train_config.eval_rows == "all"
                row["tail"], row["confusion"] = evaluator.tail_row(trained, columns if whole else (), tick)
        self._keep_row(row)

    def evaluate_segments(self) -> None:
        """Evaluate and commit the one row of a run without task boundaries."""
        columns, modes = range(len(self.stream.tasks)), self.train_config.eval_modes
        row: dict[str, Any] = {"til": None, "tail": None, "confusion": None}
        evaluator = self._evaluator()
        with self._phase("evaluate all segments", columns, len(modes)) as tick:
            if "til" in modes:
                with self._counting(True):
                    row["til"] = evaluator.til_row(self.trained, columns, tick)
            if "tail" in modes:
                row["tail"], row["confusion"] = evaluator.tail_row(self.trained, columns, tick)
        self._keep_row(row)

    def _keep_row(self, row: dict[str, Any]) -> None:
        self.done.rows.append(row)
        self.commit_progress()
        self.write_results()
        shown = row["til"] or row["tail"]
        self.progress.say(
            "  ".join(
                f"{task.name} {cell:.1f}"
                for task, cell in zip(self.stream.tasks, shown, strict=True)
                if cell is not None
            )
        )

    def final_scores(self, modes: Sequence[str]) -> dict[str, Any]:
        """Evaluate the row of all ended tasks again, without writing anything."""
        trained = self.trained
        columns = range(len(self.stream.tasks))
        evaluator = self._evaluator()
        scores: dict[str, Any] = {"method": self.config.method, "tasks": [task.name for task in self.stream.tasks]}
        with self._phase("evaluate", columns, len(modes)) as tick:
            if "til" in modes:
                row = evaluator.til_row(trained, columns, tick)
                scores["til"] = {"row": row, "op": _mean(row)}
            if "tail" in modes:
                row, confusion = evaluator.tail_row(trained, columns, tick)
                scores["tail"] = {"row": row, "op": _mean(row), "confusion": confusion}
        return scores

    def answer(self, name: str | None, prompt: str) -> str:
        """The answer to one prompt by the parameters of task `name`, or by the base model."""
        if name is None and self.kind == "classifier":
            return ""
        longest = TaskFormat(max((form.max_new_tokens for form in self.formats.values()), default=64), ())
        with self.method.answer(name):
            return self._answerer().answer(self.method.model, [prompt], self._formats()[name] if name else longest)[0]

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def views_of(self, task: Task) -> Views:
        """What the identifier learns a task from: features of its training prompts, whole and without their template."""
        texts, prompt_ids = prompt_views(prompts(task.train))
        return Views(self.features(texts), prompt_ids)

    def features(self, questions: Sequence[str]) -> Tensor:
        """(prompts, 2, D) float32 features of the base model, which the task identifier reads."""
        model, device = self.method.model, next(self.method.model.parameters()).device
        model.eval()
        parts: list[Tensor | None] = [None] * len(questions)
        config = self.train_config
        if all(task.is_text for task in self.stream.tasks):
            # a text is read as it is: in the template of a chat, short ones are mostly template, and all domains look alike
            config = dataclasses.replace(config, template="plain")
        answerer = Answerer(self.tokenizer, self.kind, config)
        with torch.no_grad(), self.method.answer(None), autocast(device, self.train_config.precision):
            for indices, batch in answerer.batches(questions, 1):
                found = prompt_features(
                    model,
                    batch["input_ids"].to(device),
                    batch["attention_mask"].to(device),
                    self.identifier.config.layer,
                )
                for index, row in zip(indices, found.float().cpu(), strict=True):
                    parts[index] = row
        return torch.stack([part for part in parts if part is not None])

    def donor(self, rows: Sequence[dict[str, Any]]) -> str | None:
        """The ended task that a new one with these encoded training examples starts from; None is the base model."""
        config = self.train_config
        return DonorProbe(self.method, self.tokenizer, config.precision, config.eval_batch_size, config.epochs).best(
            rows
        )

    def commit_task(self, name: str, views: Views, similar: str | None) -> None:
        """Write an ended task: its tensors, the registry and the identifier's state, in one commit."""
        held = self.store.files()
        before = held[REGISTRY].bytes if REGISTRY in held else 0
        self.identifier.add_task(self.method.registry.task(name).id, views.features, views.prompt_ids)
        put = {REGISTRY: self.method.registry.to_bytes()}
        for other in self.method.rewritten(name):
            put |= task_files(self.method, self.identifier, other)
        files = task_files(self.method, self.identifier, name)
        put |= files
        for other in self._shrunk:
            put |= task_files(self.method, self.identifier, other)
        if self.budget is not None:
            present = store_sizes(self.store)
            self.budget.fit(name, put, present)
            self.done.given_up += self.budget.given_up
            self.done.budget_used.append(used_bytes(present | {file: len(data) for file, data in put.items()}))
            self.budget.given_up, self._shrunk = [], []
            files = {file: put[file] for file in files}
        # what an earlier task's file gives up is there once, not twice
        freed = sum(held[file].bytes - len(data) for file, data in put.items() if file != REGISTRY and file in held)
        sizes = task_bytes(files, len(put[REGISTRY]) - before)
        self.done.capacity.append(
            {
                "task": name,
                "bytes": sizes | {"weights": max(0, sizes["weights"] - freed)},
                "bank_fraction": self.method.registry.bank_fraction() if self.method.registry.layers() else None,
            }
        )
        if similar is not None:
            self.done.similar[name] = similar
        self._commit({**put, PROGRESS: self.done.to_bytes()})

    def make_room(self, name: str) -> None:
        """Let task `name` begin within the budget, if there is one."""
        if self.budget is not None:
            self._shrunk = self.budget.make_room(name, store_sizes(self.store))

    def add_seconds(self, what: str, seconds: float) -> None:
        """Add to the time spent on `what`."""
        self.done.seconds[what] = self.done.seconds.get(what, 0.0) + seconds

    # -- files ---------------------------------------------------------------------------------------------------------

    def write_results(self) -> dict[str, Any]:
        """Write results.json from what is committed, and return it."""
        document = results_document(self.config, self.stream, self.done, self.method.registry)
        if ranks.is_writer():
            _core.atomic_write(self.path / RESULTS, (json.dumps(document, indent=1) + "\n").encode())
        return document

    def log_callback(self, task: str) -> Any:
        """A callback of the Trainer that appends what it logs to log.jsonl."""
        from transformers import TrainerCallback

        path = self.path / LOG

        class LogCallback(TrainerCallback):
            def on_log(
                self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
            ) -> None:
                if state.is_world_process_zero and logs:
                    with path.open("a") as file:
                        file.write(json.dumps({"task": task, "step": state.global_step, **logs}) + "\n")

        return LogCallback()

    def _commit(self, put: dict[str, bytes]) -> None:
        if ranks.is_writer():
            self.store.commit(put)
        ranks.wait()

    def commit_progress(self) -> None:
        """Commit rows and figures."""
        self._commit({PROGRESS: self.done.to_bytes()})

    def _answerer(self) -> Answerer:
        return Answerer(self.tokenizer, self.kind, self.train_config)

    def _evaluator(self) -> Evaluator:
        method: Any = self.method
        if self.config.online is not None:
            method = SegmentMethod(method, self.done.online.get("domains", {}))
        return Evaluator(method, self._answerer(), self.stream, self._formats(), self.identifier, self.features)

    def _formats(self) -> dict[str, TaskFormat]:
        return self.formats if self.config.online is None else segment_formats(self.formats, self.method.registry)

    @contextmanager
    def _phase(self, title: str, columns: Sequence[int], modes: int) -> Iterator[Any]:
        limit = self.train_config.eval_limit
        total = sum(len(self.stream.tasks[column].test[:limit]) for column in columns) * modes
        done = 0
        with self.progress.phase(title, total=total) as phase:

            def tick(task: str, count: int) -> None:
                nonlocal done
                done += count
                phase.update(done)

            yield tick

    @contextmanager
    def _counting(self, count: bool) -> Iterator[None]:
        model = self.method.model
        if not count or not isinstance(model, MosesModel):
            yield
            return
        with model.counting_experts() as counts:
            yield
        names = {info.id: info.name for info in self.method.registry.tasks()}
        for (task, router), tokens in counts.items():
            shares = (tokens.double() / max(int(tokens.sum()), 1)).tolist()
            self.done.expert_use.setdefault(names[task], {})[router] = shares


@contextmanager
def start_session(
    path: str | PathLike[str],
    model: nn.Module | str,
    tokenizer: Any,
    stream: Stream,
    source: str | None,
    method: str,
    method_config: Any,
    train_config: TrainConfig,
    identifier_config: IdentifierConfig,
    dtype: str,
    resume: bool,
    progress: Progress,
    online: dict[str, Any] | None = None,
    budget: int | None = None,
) -> Iterator[Session]:
    """Begin a run, or go on with one that was interrupted. See `moses.train`."""
    folder = Path(path)
    device = ranks.join()
    exists = is_run(folder)
    ranks.wait()  # every process has looked before the first one makes the folder
    if exists and not resume:
        raise RunError(
            f"{folder}: holds a run already; go on with it by --resume, or give another --out", code="run_exists"
        )
    if not exists and folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise RunError(f"{folder}: is neither empty nor a run; give another --out", code="not_a_run")
    model_name = _place(model) if isinstance(model, str) else None
    if isinstance(model, str):
        model, tokenizer, kind = load_model(model, dtype)
    elif tokenizer is None:
        raise ModelError("a model in memory needs its tokenizer; pass both", code="tokenizer_needed")
    else:
        kind = kind_of(model.config)
    if isinstance(model, MosesModel):
        raise ModelError(
            "the model has sub-experts already; give the base model, or moses.detach it", code="already_attached"
        )
    # a wrong name, and a stream that the model cannot learn, is found before the folder is made
    _check_texts(stream, kind)
    method_class(method).check_model(model, method_config)
    if online is not None:
        check_online(method_class(method), train_config, kind)
    formats = {task.name: _format(task, tokenizer, kind, train_config) for task in stream.tasks}
    config = RunConfig(
        method=method,
        method_config=to_json(method_config),
        train_config=to_json(train_config),
        identifier_config=to_json(identifier_config),
        model=model_source(model, model_name),
        stream=stream_source(stream, source and _place(source)),
        formats={
            name: {"max_new_tokens": form.max_new_tokens, "labels": list(form.labels)} for name, form in formats.items()
        },
        online=online,
        budget=budget,
    )
    model.to(device)
    attached = None
    if budget is not None and not exists:  # a budget that is too small is found before the folder is made
        attached = method_class(method)(model, method_config)
        identifier = TaskIdentifier(identifier_config, hidden_size(model))
        Budget(budget, attached, identifier, len(stream.tasks) if online is None else 1)
    with ExitStack() as stack:
        if ranks.is_writer():
            store = stack.enter_context(_core.Store.open(folder, write=True) if exists else _core.Store.create(folder))
            if store.recovered:
                progress.say(store.recovered)
            if CONFIG not in store.files():
                store.commit({CONFIG: config.to_bytes()})
        ranks.wait()
        if not ranks.is_writer():
            store = stack.enter_context(_core.Store.open(folder))
        read_config(store).require_same(config)
        yield _session(folder, store, config, model, tokenizer, stream, formats, progress, attached)


@contextmanager
def open_session(
    path: str | PathLike[str], model: nn.Module | str | None = None, stream: Stream | str | None = None
) -> Iterator[Session]:
    """Open a run to evaluate it or to answer with it; nothing is written.

    Raises:
        RunError: the stream or tokenizer is not where the run says, or has changed.
    """
    with _core.Store.open(path) as store:
        config = read_config(store)
        if config.stream is None:
            raise RunError(
                f"{path}: was saved without a stream; use moses.load and evaluate it by hand", code="no_stream"
            )
        if not isinstance(stream, Stream):
            place = stream or config.stream.source
            if place is None:
                raise RunError(f"{path}: its stream was given in memory; pass it again", code="no_stream")
            stream = load_stream(place, config.stream.tasks)
        if stream_source(stream, None).digest != config.stream.digest:
            raise RunError(
                f"{path}: the stream {config.stream.source} is not the one of the run; its examples have changed",
                code="stream_differs",
            )
        source = model if isinstance(model, str) else config.model.source
        if source is None:
            raise ModelError(f"{path}: its base model was given in memory; name one", code="model_needed")
        base, tokenizer, _ = load_model(source, config.model.dtype)
        formats = {
            name: TaskFormat(form["max_new_tokens"], tuple(form["labels"])) for name, form in config.formats.items()
        }
        yield _session(Path(path), store, config, base, tokenizer, stream, formats, Progress())


def stream_source(stream: Stream, source: str | None) -> StreamSource:
    """What a run says of its stream."""
    texts = [
        (f"{task.name}/{split}", json.dumps([[row.prompt, row.answer] for row in getattr(task, split)]).encode())
        for task in stream.tasks
        for split in ("train", "test")
    ]
    names = tuple(task.name for task in stream.tasks)
    return StreamSource(
        source, stream.name, names, {task.name: task.metric for task in stream.tasks}, _core.hash_buffers(texts)
    )


def _session(
    folder: Path,
    store: _core.Store,
    config: RunConfig,
    model: nn.Module,
    tokenizer: Any,
    stream: Stream,
    formats: dict[str, TaskFormat],
    progress: Progress,
    attached: Method | None = None,
) -> Session:
    base = load_base(config, model) if attached is None else model
    done = RunProgress.from_bytes(store.read(PROGRESS)) if PROGRESS in store.files() else RunProgress()
    method, identifier = load_method(store, config, base, attached)
    assert identifier is not None
    if isinstance(method.model, MosesModel):
        method.model.identifier = identifier
    budget = None
    if config.budget is not None:
        num_tasks = 1 if config.online is not None else len(stream.tasks)
        budget = Budget(config.budget, method, identifier, num_tasks)
    return Session(
        path=folder,
        store=store,
        config=config,
        method=method,
        tokenizer=tokenizer,
        kind=config.model.kind,  # type: ignore[arg-type]
        stream=stream,
        formats=formats,
        identifier=identifier,
        train_config=from_settings(TrainConfig, config.train_config),
        progress=progress,
        done=done,
        budget=budget,
    )


def _format(task: Task, tokenizer: Any, kind: Kind, config: TrainConfig) -> TaskFormat:
    if kind == "classifier":
        return TaskFormat(1, tuple(label_names(task.train)))
    if config.max_new_tokens is not None or task.is_text:
        return TaskFormat(config.max_new_tokens or _TEXT_TOKENS, ())
    longest = max(len(tokenizer(example.answer, add_special_tokens=False)["input_ids"]) for example in task.train)
    return TaskFormat(longest + 4, ())


def _check_texts(stream: Stream, kind: Kind) -> None:
    texts = [task.name for task in stream.tasks if task.is_text]
    if texts and len(texts) < len(stream.tasks):
        other = next(task.name for task in stream.tasks if not task.is_text)
        raise StreamError(
            f"task {texts[0]!r} is scored by perplexity and {other!r} by answers, which have no mean: choose by --tasks",
            code="mixed_metrics",
        )
    if texts and kind != "causal":
        raise ModelError(
            f"task {texts[0]!r} has texts to model, and the model is a {kind}: give a causal language model",
            code="not_causal",
        )


def _place(name: str) -> str:
    """A path as it holds from any folder; a name of a hub or of a built-in stream as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _mean(row: Sequence[float | None]) -> float | None:
    cells = [cell for cell in row if cell is not None]
    return sum(cells) / len(cells) if cells else None
