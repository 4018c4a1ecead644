"""Commands that change checkpoints on disk: prune, grow, extract, merge, convert. None of them imports torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moses.cli import calls, surgery_runs
from moses.cli.running import AsJson
from moses.run_files import is_run

if TYPE_CHECKING:
    from moses.surgery import Surgery, Writing

Source = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, or a run of moses.")]
Layers = Annotated[
    str | None, typer.Option("--layers", metavar="all|0,2", help="Of a run: which layers, by block; all by default.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder to write; it must not be there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, from headers alone.")]
Link = Annotated[bool, typer.Option("--link", help="Link shards that do not change instead of copying them.")]
Hash = Annotated[bool, typer.Option("--hash", help="Record hashes of what was kept, taken in the same pass.")]
Uneven = Annotated[
    bool,
    typer.Option("--uneven", help="Allow layers with different numbers of experts; transformers cannot load them."),
]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, help="Experts that a token uses afterwards.")]


class Rows(StrEnum):
    """Gate rows of new experts."""

    AUTO = "auto"
    COPY = "copy"
    MASKED = "masked"


class By(StrEnum):
    """What says which experts of a run matter least."""

    USE = "use"
    NORM = "norm"


class LayoutOption(StrEnum):
    """How experts lie in files."""

    FUSED = "fused"
    PER_EXPERT = "per-expert"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (prune, grow, extract, merge, convert):
        app.command()(command)


def prune(
    checkpoint: Source,
    out: Out = None,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="0,3,5-7", help="The experts of every layer that stay.")
    ] = None,
    layer_experts: Annotated[
        Path | None, typer.Option("--layer-experts", metavar="JSON", help="The experts that stay, lists by layer.")
    ] = None,
    usage: Annotated[
        str | None,
        typer.Option(
            "--usage", metavar="JSON|magnitude", help="A number for each expert by layer, or the norm of its weights."
        ),
    ] = None,
    to: Annotated[
        int | None, typer.Option("--to", min=1, help="How many experts of each layer stay, by usage.")
    ] = None,
    keep_usage: Annotated[
        float | None, typer.Option("--keep-usage", help="Of a run: the share of each layer's tokens that stays served.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="2MB", help="Of a run: bytes that its experts may take.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option("--experts", metavar="2,5", help="Of a run: the experts of every layer that go.")
    ] = None,
    by: Annotated[By, typer.Option("--by", help="What is measured: use, or router-weighted norm.")] = By.USE,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate", metavar="STREAM", help="Where use is measured; a checkpoint is loaded and run for it."
        ),
    ] = None,
    layers: Layers = None,
    top_k: TopK = None,
    link: Link = False,
    hash_kept: Hash = False,
    uneven: Uneven = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Leave fewer experts in a checkpoint, and their rows in the gates."""
    from moses.surgery.selection import read_choice, read_usage

    if is_run(checkpoint):
        surgery_runs.refuse(
            "a run",
            {"--keep": keep, "--layer-experts": layer_experts, "--usage": usage, "--top-k": top_k, "--link": link}
            | {"--hash": hash_kept, "--uneven": uneven},
        )
        chosen_gone = None if experts is None else [int(number) for number in read_choice(experts)]
        options = {"keep_usage": keep_usage, "to": to, "budget": budget}
        surgery_runs.prune(checkpoint, out, layers, options, chosen_gone, by.value, calibrate, dry_run, as_json)
        return
    surgery_runs.refuse(
        "a checkpoint",
        {"--keep-usage": keep_usage, "--budget": budget, "--experts": experts, "--layers": layers}
        | {"--by": by is not By.USE and calibrate is None},
    )
    if sum(given is not None for given in (keep, layer_experts, usage, calibrate)) != 1:
        raise typer.BadParameter("give one of --keep, --layer-experts, --usage, --calibrate")
    if (usage is None and calibrate is None) != (to is None):
        raise typer.BadParameter("--to belongs to --usage and --calibrate, and they to it")
    from moses import surgery

    chosen = None if to is not None else read_choice(keep or str(layer_experts))
    scores: Any = None
    if calibrate is not None:
        surgery.open_checkpoint(checkpoint)  # what surgery would refuse is refused before an hour's forward passes
        scores = calls.usage_of(checkpoint, calibrate, by.value)
    elif usage is not None:
        scores = "magnitude" if usage == "magnitude" else read_usage(Path(usage))
    carry_out(
        lambda writing: surgery.prune(
            checkpoint,
            out,
            keep=chosen,
            usage=scores,
            to=to,
            top_k=top_k,
            writing=writing,
        ),
        checkpoint,
        out,
        {"link": link, "hash": hash_kept, "uneven": uneven, "dry_run": dry_run},
        as_json,
    )


def grow(
    checkpoint: Source,
    add: Annotated[int, typer.Option("--add", min=1, help="Experts to add to every layer.")],
    out: Out = None,
    sources: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="0,1,2",
            help="The experts to copy, in turn; all by default. Of a run: most-used (the default), fresh, or a number.",
        ),
    ] = None,
    layers: Layers = None,
    noise: Annotated[
        float | None,
        typer.Option(
            "--noise", min=0.0, help="Of the copies: relative to the deviation of each matrix; 0, of a run 0.01."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise.")] = 0,
    rows: Annotated[
        Rows,
        typer.Option(
            "--rows", help="Gate rows of new experts: copied, never chosen (masked), or masked where it can be."
        ),
    ] = Rows.AUTO,
    top_k: TopK = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change the folder itself, writing only what is new.")
    ] = False,
    link: Link = False,
    hash_kept: Hash = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Add experts to every layer of a checkpoint, and their rows to the gates."""
    if is_run(checkpoint):
        surgery_runs.refuse(
            "a run",
            {"--rows": rows is not Rows.AUTO, "--top-k": top_k, "--in-place": in_place, "--link": link}
            | {"--hash": hash_kept, "--dry-run": dry_run},
        )
        surgery_runs.grow(checkpoint, out, layers, add, sources, noise, seed, as_json)
        return
    surgery_runs.refuse("a checkpoint", {"--layers": layers})
    from moses import surgery
    from moses.surgery.selection import read_choice

    chosen = None if sources is None else read_choice(sources)
    carry_out(
        lambda writing: surgery.grow(
            checkpoint,
            out,
            add=add,
            sources=chosen,
            noise=noise or 0.0,
            seed=seed,
            new_rows=rows.value,
            top_k=top_k,
            writing=writing,
        ),
        checkpoint,
        out,
        {"in_place": in_place, "link": link, "hash": hash_kept, "dry_run": dry_run},
        as_json,
    )


def extract(
    checkpoint: Source,
    experts: Annotated[
        str | None,
        typer.Option("--experts", metavar="JSON|0,3", help="The domain's experts: of every layer, or lists by layer."),
    ] = None,
    domain: Annotated[
        str | None, typer.Option("--domain", metavar="D", help="Of a run: the domain, or task, whose model it is.")
    ] = None,
    merge_group: Annotated[
        bool, typer.Option("--merge-group", help="Of a run: average a group of experts to one FFN; says what it cost.")
    ] = False,
    out: Out = None,
    mixture: Annotated[
        bool, typer.Option("--mixture", help="Stay a mixture, also where one expert is left of every layer.")
    ] = False,
    top_k: TopK = None,
    link: Link = False,
    hash_kept: Hash = False,
    uneven: Uneven = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Take a domain's experts out into a checkpoint of their own.

    A smaller mixture, or a dense model when one expert is left of every layer and the type has a dense one.
    """
    if is_run(checkpoint):
        surgery_runs.refuse(
            "a run",
            {"--experts": experts, "--mixture": mixture, "--top-k": top_k, "--link": link, "--hash": hash_kept}
            | {"--uneven": uneven, "--dry-run": dry_run},
        )
        surgery_runs.extract(checkpoint, domain, out, merge_group, as_json)
        return
    surgery_runs.refuse("a checkpoint", {"--domain": domain, "--merge-group": merge_group})
    if experts is None:
        raise typer.BadParameter("give --experts: what stays")
    from moses import surgery
    from moses.surgery.selection import read_choice

    chosen = read_choice(experts)
    carry_out(
        lambda writing: surgery.extract(
            checkpoint, out, experts=chosen, dense=False if mixture else None, top_k=top_k, writing=writing
        ),
        checkpoint,
        out,
        {"link": link, "hash": hash_kept, "uneven": uneven, "dry_run": dry_run},
        as_json,
    )


def merge(
    checkpoints: Annotated[list[Path], typer.Argument(metavar="CHECKPOINT...", help="Checkpoints of one model.")],
    out: Out = None,
    top_k: TopK = None,
    link: Link = False,
    hash_kept: Hash = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Put the experts of later checkpoints beside the first's, and join the gates' rows."""
    from moses import surgery

    carry_out(
        lambda writing: surgery.merge(checkpoints, out, top_k=top_k, writing=writing),
        checkpoints[0],
        out,
        {"link": link, "hash": hash_kept, "dry_run": dry_run},
        as_json,
    )


def convert(
    checkpoint: Source,
    layout: Annotated[
        LayoutOption, typer.Option("--layout", help="One tensor for all experts of a layer, or one for each.")
    ],
    out: Out = None,
    hash_kept: Hash = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write the same model with its experts in another layout."""
    from moses import surgery

    carry_out(
        lambda writing: surgery.convert(checkpoint, out, layout=layout.value, writing=writing),
        checkpoint,
        out,
        {"hash": hash_kept, "dry_run": dry_run},
        as_json,
    )


def carry_out(
    work: Callable[[Writing], Surgery], source: Path, out: Path | None, options: dict[str, Any], as_json: bool
) -> None:
    """Do surgery that is written as `options` say, and show what was done."""
    from moses.surgery import Writing

    if out is None and not options.get("in_place") and not options["dry_run"]:
        raise typer.BadParameter("give --out, or --dry-run")
    start = time.perf_counter()
    done = work(Writing(**options, progress=_Bar() if sys.stderr.isatty() else None))
    seconds = time.perf_counter() - start
    document = done.as_dict()
    if done.path is None:
        document["seconds"] = _estimate(document, (out if out is not None else source).parent)
    else:
        document["seconds"] = seconds
    if as_json:
        from moses.cli.output import print_json

        print_json(document)
    else:
        from moses.cli.show_surgery import show_surgery

        show_surgery(document, done.plan)


def _estimate(document: dict[str, Any], folder: Path) -> float | None:
    from moses.surgery.speed import write_speed

    speed = write_speed(folder)
    return None if speed is None else float(document["bytes_written"]) / speed


class _Bar:
    """Progress on a terminal: a line that is written over."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        seconds = max(time.perf_counter() - self.start, 1e-6)
        left = (total - done) * seconds / done if done else 0.0
        share = done / total if total else 1.0
        line = f"{100 * share:5.1f}%  {done / seconds / 1e9:.2f} GB/s  {left:.0f} s left"
        sys.stderr.write(f"\r{line:<60}" + ("\r" + " " * 60 + "\r" if done >= total else ""))
        sys.stderr.flush()
