"""The command that makes a mixture of a dense model: upcycle."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from moses.cli.output import print_fields, print_json
from moses.cli.surgery import DryRun, Hash, Link, carry_out
from moses.errors import ConfigError, SurgeryError


class RouterName(StrEnum):
    """The routers of an upcycled model."""

    TOPK = "topk"
    NOISY_TOPK = "noisy_topk"
    GSHARD = "gshard"
    DENSE = "dense"
    SWITCH = "switch"
    EXPERT_CHOICE = "expert_choice"


class Dtype(StrEnum):
    """The dtype in which a model is loaded and written."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(upcycle)


def upcycle(
    model: Annotated[
        str, typer.Argument(metavar="M", help="A dense model: a folder, a hub name, or a name that moses knows.")
    ],
    out: Annotated[Path | None, typer.Option("--out", metavar="MOE", help="The folder to write.")] = None,
    experts: Annotated[int, typer.Option("--experts", metavar="E", help="Experts a layer.")] = 8,
    every: Annotated[
        int | None, typer.Option("--every", metavar="N", help="Experts in every N-th block; 2 by default, 1 for all.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="0,2,4", help="The blocks with experts, in place of --every.")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Experts a token.")] = 2,
    router: Annotated[RouterName, typer.Option("--router", help="How a token finds its experts.")] = RouterName.TOPK,
    noise: Annotated[
        float, typer.Option("--noise", help="Noise on all experts but the first, relative to the weights' deviation.")
    ] = 0.0,
    reinit: Annotated[
        float, typer.Option("--reinit", help="Share of the neurons drawn anew in all experts but the first.")
    ] = 0.0,
    keep_dense: Annotated[
        bool, typer.Option("--keep-dense", help="Leave the FFN in place; experts beside it start at zero.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of gates, noise and new neurons.")] = 0,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="In which the model is loaded and written.")] = Dtype.AUTO,
    link: Link = False,
    hash_kept: Hash = False,
    dry_run: DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Make a mixture of experts of a dense model, which computes the same.

    A folder that a class of transformers can hold as a mixture is done on disk, without loading it; every other model, and --router,
    --reinit, --keep-dense and --dtype, in memory.
    """
    numbers = None if layers is None else parse_layers(layers)
    in_memory = router is not RouterName.TOPK or reinit != 0 or keep_dense or dtype is not Dtype.AUTO
    on_disk = link or hash_kept or dry_run
    if in_memory and on_disk:
        raise typer.BadParameter(
            "--link, --hash and --dry-run are of surgery on disk, which knows topk gates and copies"
        )
    if out is None and not dry_run:
        raise typer.BadParameter("give --out, or --dry-run")
    if on_disk or (not in_memory and (Path(model) / "config.json").is_file()):
        from moses import surgery

        try:
            carry_out(
                lambda writing: surgery.upcycle(
                    model,
                    out,
                    num_experts=experts,
                    every=every,
                    layers=numbers,
                    top_k=top_k,
                    noise=noise,
                    seed=seed,
                    writing=writing,
                ),
                Path(model),
                out,
                {"link": link, "hash": hash_kept, "dry_run": dry_run},
                as_json,
            )
            return
        except SurgeryError as error:
            if on_disk or error.code != "not_upcyclable":
                raise
    from moses.growth.convert import upcycle_to_folder

    assert out is not None
    made = upcycle_to_folder(
        model,
        out,
        num_experts=experts,
        every=every,
        layers=numbers,
        top_k=top_k,
        router=router.value,
        noise=noise,
        reinit=reinit,
        keep_dense=keep_dense,
        seed=seed,
        dtype=dtype.value,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if as_json:
        print_json(made)
        return
    _print(made)


def _print(made: dict[str, Any]) -> None:
    kind = made["model_type"]
    held = f"{kind}, which transformers loads" if kind != "moses" else f"moses's own, as {made['why_moses']}"
    print_fields(
        [
            ("written", made["path"]),
            ("format", held),
            ("blocks", ", ".join(map(str, made["blocks"]))),
            ("experts", f"{made['experts']}, {made['top_k']} a token"),
            (
                "logits differ",
                "not compared" if made["difference"] is None else f"{made['difference']:.1e} of the largest",
            ),
            ("parameters", f"{made['parameters_before']:,} -> {made['parameters']:,}"),
        ]
    )


def parse_layers(text: str) -> list[int]:
    """`0,2,4` as numbers. Raises ConfigError for what is no number."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--layers {text!r}: not numbers of blocks; write --layers 0,2,4", code="bad_setting"
        ) from None
