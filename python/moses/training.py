"""Trains a stream task by task with the Trainer of transformers, and evaluates every row of R into the run folder.

Each ended task is one atomic commit, and so is each evaluated row: an interrupted run goes on from the last of them and
ends in the same results, since every task starts from seeds that depend on its number alone.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .budget import identifier_features, parse_bytes
from .cheaper import at_learned_columns, training_attention
from .config import TrainConfig, from_settings, to_json
from .errors import ConfigError
from .methods import Method, method_class
from .online import concatenated, online_config, run_online
from .progress import Progress
from .run_files import TRAINER
from .seeds import stable_seed
from .session import Session, start_session
from .stream import Stream, load_stream
from .stream.identify import IdentifierConfig
from .stream.prompt import Collator, Cuts, encode_train
from .stream.task import Task
from .stream.text import packed


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: the run folder.
        matrix: R[t][i] with the task given (inferred, where only that was asked for); None where a cell does not exist.
        metrics: OP, Avg, BWT, FWT and forgetting of the matrix.
        results: the whole of results.json.
        model: the trained model.
    """

    path: Path
    matrix: list[list[float | None]]
    metrics: dict[str, float | None]
    results: dict[str, Any]
    model: nn.Module | None


def train(
    model: nn.Module | str,
    tokenizer: Any = None,
    stream: Stream | str | PathLike[str] = "demo",
    method: str = "moses",
    output_dir: str | PathLike[str] = "run",
    *,
    tasks: Sequence[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
    boundaries: str = "given",
    budget: int | str | None = None,
) -> Run:
    """Train `model` on every task of `stream`, one after the other, and evaluate every cell of R.

    Args:
        model: a path, hub name or alias (`moses.models.ALIASES`), or a model in memory with its `tokenizer`.
        stream: a `Stream`, a folder in TRACE's format, or a built-in name.
        method: a name of `moses.methods.METHODS`.
        output_dir: the run folder; it must be absent or empty, but for `resume`.
        tasks: which tasks of the stream, in which order.
        resume: go on with a run that was interrupted; start it where there is none; end at once where it is finished.
        seed: of data order and everything the method draws.
        settings: fields of `TrainConfig`, of the method's config, and `identifier.FIELD` of `IdentifierConfig`; without boundaries
            also `horizon` and `drift.FIELD` (see `moses.online` and `moses.stream.drift`).
        boundaries: `given`, or `none`: the stream is read once, and tasks are opened where a change is found. A task that
            `tasks` names again comes back there.
        budget: bytes that all tasks together may add, as a number or like `500kB`; None is no limit.

    Returns:
        The finished run.

    Raises:
        ConfigError, StreamError, ModelError: a setting, the stream or the model is wrong.
        RunError: the folder holds something else, or a run with other settings.
    """
    if boundaries not in ("given", "none"):
        raise ConfigError(f"boundaries is {boundaries!r}; it must be given or none", code="bad_setting")
    settings, online = dict(settings or {}), None
    if boundaries == "none" and tasks is not None:
        visits, tasks = list(tasks), list(dict.fromkeys(tasks))
    else:
        visits = None
    loaded = (
        stream
        if isinstance(stream, Stream)
        else load_stream(stream if isinstance(stream, str) else Path(stream), tasks)
    )
    if boundaries == "none":
        online, settings = online_config(visits or [task.name for task in loaded.tasks], settings)
        concatenated(loaded, online.visits)  # a domain that nobody knows is found before anything is written
    limit = None if budget is None else parse_bytes(budget)
    if limit is not None:
        settings.setdefault("identifier.num_features", identifier_features(limit, len(loaded.tasks)))
    method_settings, train_config, identifier_config, dtype = split_settings(method, settings, seed)
    source = None if isinstance(stream, Stream) else str(stream)
    with (
        progress or Progress() as shown,
        start_session(
            output_dir,
            model,
            tokenizer,
            loaded,
            source,
            method,
            method_settings,
            train_config,
            identifier_config,
            dtype,
            resume,
            shown,
            None if online is None else to_json(online),
            limit,
        ) as session,
    ):
        if not session.finished and online is not None:
            run_online(session, online)
        elif not session.finished:
            _run(session)
        results = session.write_results()
        trained = session.method.model
    mode = results["til"] or results["tail"]
    return Run(Path(output_dir), mode["matrix"], mode["metrics"], results, trained)


def split_settings(method: str, settings: dict[str, Any], seed: int) -> tuple[Any, TrainConfig, IdentifierConfig, str]:
    """Sort flat settings into the method's config, the training's, the identifier's, and the dtype to load the model in."""
    cls = method_class(method)
    settings = {"seed": seed, **settings}
    dtype = settings.pop("dtype", "auto")
    ours = {field.name for field in dataclasses.fields(cls.config_class)}
    training = {field.name for field in dataclasses.fields(TrainConfig)}
    identifying = {
        key.removeprefix("identifier."): value for key, value in settings.items() if key.startswith("identifier.")
    }
    plain = {key: value for key, value in settings.items() if not key.startswith("identifier.")}
    for key in plain:
        if key not in ours | training:
            known = ", ".join(sorted(ours | training))
            raise ConfigError(
                f"unknown setting {key!r} for method {method!r}; known are {known}, dtype and identifier.*",
                code="unknown_setting",
            )
    return (
        from_settings(cls.config_class, {key: value for key, value in plain.items() if key in ours}),
        from_settings(TrainConfig, {key: value for key, value in plain.items() if key in training}),
        from_settings(IdentifierConfig, identifying),
        dtype,
    )


def _run(session: Session) -> None:
    session.evaluate_base()
    names = [task.name for task in session.stream.tasks]
    for index, task in enumerate(session.stream.tasks):
        if task.name not in session.ended:
            seconds = time.monotonic()
            _train_task(session, index, task)
            session.add_seconds("train", time.monotonic() - seconds)
        session.evaluate_row(names[: index + 1])


def _train_task(session: Session, index: int, task: Task) -> None:
    from transformers import set_seed

    method, config = session.method, session.train_config
    labels = session.formats[task.name].labels
    seed = stable_seed(config.seed, "task", index) % 2**32
    set_seed(seed)
    views = session.views_of(task)
    rows = _rows(session, session.method.trains_on(session.stream, index))
    similar = session.donor(rows) if method.reads_similar else None
    method.see_task(rows)
    session.make_room(task.name)
    method.begin_task(task.name, task.domain, len(labels) if session.kind == "classifier" else None, similar)
    if rows:
        _fit(session, index, task, rows, seed)
    method.end_task(task.name)
    session.commit_task(task.name, views, similar)


def _rows(session: Session, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The encoded training examples of these tasks."""
    config, rows = session.train_config, []
    for task in tasks:
        if task.is_text:
            rows += packed(session.tokenizer, [example.answer for example in task.train], config.max_length)
            continue
        cuts = Cuts()
        rows += [
            encode_train(
                session.tokenizer,
                example,
                config.max_length,
                session.kind,
                labels=session.formats[task.name].labels,
                template=config.template,
                cuts=cuts,
            )
            for example in task.train
        ]
        if cuts.cut:
            session.progress.say(f"{task.name}: {cuts}")
    return rows


def _fit(session: Session, index: int, task: Task, rows: list[dict[str, Any]], seed: int) -> None:
    method, config = session.method, session.train_config
    trainer_folder = session.path / TRAINER
    trainer = _trainer_class(method)(
        model=method.model,
        args=_arguments(config, trainer_folder, seed),
        train_dataset=rows,
        data_collator=Collator(session.tokenizer),
        callbacks=[*method.callbacks(), session.log_callback(task.name)],
    )
    with session.progress.phase(f"train {index + 1}/{len(session.stream.tasks)} {task.name}", total=0) as phase:
        from .progress import show_in

        show_in(trainer, phase)
        half = config.precision != "float32" or method.model.dtype in (torch.bfloat16, torch.float16)
        with training_attention(method.model, max(len(row["input_ids"]) for row in rows), half):
            trainer.train()
    # Accelerate's mixed precision patches the model's forward; the model goes back to what it was.
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    shutil.rmtree(trainer_folder, ignore_errors=True)


def _trainer_class(method: Method) -> Any:
    """The Trainer, which adds the method's own loss to the task's."""
    from transformers import Trainer

    class MethodTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            # (DataParallel would cut the columns into parts, as it does the rows)
            whole_logits = method.reads_logits or self.args.n_gpu > 1
            given = inputs if whole_logits else at_learned_columns(self.accelerator.unwrap_model(model), inputs)
            with method.watch() as seen:
                loss, outputs = super().compute_loss(model, given, True, num_items_in_batch)
            extra = method.extra_loss(model, inputs, outputs, seen)
            if extra is not None:
                # the task's loss is a mean over the whole step where the model takes the number of its tokens, else the Trainer divides it
                whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
                loss = loss + (extra / self.current_gradient_accumulation_steps if whole else extra)
            return (loss, outputs) if return_outputs else loss

    return MethodTrainer


def _arguments(config: TrainConfig, folder: Path, seed: int) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type="linear",
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bfloat16",
        fp16=config.precision == "float16",
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
        save_strategy="no",  # an interrupted task is trained again from its start, to the same bits
        logging_steps=10,
        report_to=os.environ.get("MOSES_REPORT_TO", "none"),
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
