"""Documents of inspect, verify and doctor as text for people; `inspect` whole, so that it needs no typer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moses.cli.output import print_fields, print_json, print_table
from moses.report.text import NOTHING, format_bytes, format_share

_NUMBER = re.compile(r"\d+")

Document = Mapping[str, Any]


def inspect(path: Path, as_json: bool) -> None:
    """Say what is in a run or a checkpoint: one JSON document, or text for people."""
    from moses.inspect import inspect_path

    document = inspect_path(path)
    if as_json:
        print_json(document)
    else:
        (_show_run if document["kind"] == "run" else _show_checkpoint)(document)


def show_verdict(document: Document) -> None:
    """What `Verdict.as_dict` returned: what is wrong first, a line each, then the sum."""
    for problem in document["problems"]:
        print_fields([("problem", f"{problem['file']}: {problem['problem']}; {problem['mend']}")])
    for note in document["notes"]:
        print_fields([("note", note)])
    compared = [task for task in document["tasks"] if "identical" in task]
    if compared:
        same = sum(task["identical"] for task in compared)
        print_fields([("frozen", f"{same} of {len(compared)} tasks are bit-identical to {document['against']}")])
    hashed = sum(task["content_hash"] is not None for task in document["tasks"])
    tasks = f", {hashed} tasks" if document["kind"] == "run" else ""
    result = "ok" if document["ok"] else f"{len(document['problems'])} problems"
    print_fields([("checked", f"{document['path']}: {document['num_files']} files{tasks}: {result}")])


def show_checkup(document: Document) -> None:
    """What `Checkup.as_dict` returned."""
    machine, cuda = document["platform"], document["cuda"]
    fields = [(name, version or "not installed") for name, version in document["versions"].items()]
    fields.append(
        ("machine", f"{machine['system']}, {machine['cpus']} cores, {format_bytes(machine['memory_bytes'])} of memory")
    )
    fields += list(document["threads"].items())
    devices = ", ".join(cuda["devices"]) or "none (none is needed)"
    fields.append(("CUDA devices", devices + (f", driver {cuda['driver']}" if cuda["driver"] else "")))
    kernels = cuda["kernels"]
    state = f"by NVRTC {kernels['nvrtc']}" if kernels["available"] else f"none, plain torch instead: {kernels['why']}"
    fields.append(("CUDA kernels", state))
    if "torch" in cuda and cuda["torch"] is not None:
        seen = ", ".join(cuda["torch"]["devices"]) or "none"
        fields.append(
            ("torch sees", f"{seen}; CUDA {cuda['torch']['cuda'] or NOTHING}, {cuda['torch']['threads']} threads")
        )
    for name, cache in document["caches"].items():
        state = "" if cache["exists"] else " (not there yet)"
        fields.append((f"{name} cache", f"{cache['path']}{state}{', offline' if cache.get('offline') else ''}"))
    print_fields(fields)
    for missing in document["missing"]:
        kind = "missing" if missing["required"] else "optional"
        print_fields([(kind, f"{missing['what']}: {missing['mend']}")])
    print_fields([("result", "ready" if document["ok"] else "not ready")])


def _show_run(document: Document) -> None:
    bank, files = document["bank"], document["files"]
    model, stream = document["model"], document["stream"]
    fields: list[tuple[str, object]] = [
        ("run", document["path"]),
        ("method", document["method"]),
        ("model", f"{model['source'] or 'given in memory'} ({model['model_type']}, {model['kind']}, {model['dtype']})"),
        ("fingerprint", model["fingerprint"]),
        (
            "stream",
            NOTHING if stream is None else f"{stream['source'] or stream['name']} ({len(stream['tasks'])} tasks)",
        ),
        ("seed", NOTHING if document["seed"] is None else document["seed"]),
        ("generation", document["generation"]),
        ("files", f"{files['count']} files, {format_bytes(files['bytes'])}"),
    ]
    if document["unfinished_commit"]:
        fields.append(("note", "a commit was interrupted: the next command that writes clears what it left"))
    if bank["layers"]:
        used, size = format_bytes(bank["used_bytes"]), format_bytes(bank["bytes"])
        share = format_share(bank["fraction"])
        fields.append(
            ("bank", f"{bank['layers']} layers, {bank['experts']} experts, {used} of {size} in use ({share})")
        )
    print_fields(fields)
    print()
    tasks = document["tasks"]
    if tasks:
        kinds = list(tasks[0]["bytes"])
        rows = [_task_row(task) for task in tasks]
        print_table("tasks", ["id", "name", "state", "units", *kinds, "sum", "content"], rows, num_text=3)
    if document["layers"]:
        _show_layers(document["layers"])
    if any(any(row) for row in document["overlap"]) and len(tasks) <= 12:
        names = [task["name"] for task in tasks]
        rows = [[name, *map(format_bytes, row)] for name, row in zip(names, document["overlap"], strict=True)]
        print_table("bytes that two tasks share", ["", *names], rows)


def _task_row(task: Document) -> list[object]:
    sizes = [*task["bytes"].values(), sum(task["bytes"].values())]
    content = (task["content_hash"] or NOTHING)[:8]
    return [task["id"], task["name"], task["state"], task["units"], *map(format_bytes, sizes), content]


def _show_layers(layers: Sequence[Document]) -> None:
    groups: dict[str, list[Document]] = {}
    for layer in layers:
        groups.setdefault(_NUMBER.sub("*", layer["name"]), []).append(layer)
    rows = [
        [
            name,
            len(group),
            sum(len(layer["experts"]) for layer in group),
            sum(space["units"] for layer in group for space in layer["spaces"]),
            sum(space["used"] for layer in group for space in layer["spaces"]),
            format_bytes(sum(layer["bytes"] for layer in group)),
            format_share(_share(group)),
        ]
        for name, group in groups.items()
    ]
    print_table("layers", ["name", "layers", "experts", "units", "used", "bytes", "in use"], rows)


def _share(group: Sequence[Document]) -> float | None:
    size = sum(layer["bytes"] for layer in group)
    return sum(layer["used_bytes"] for layer in group) / size if size else None


def _show_checkpoint(document: Document) -> None:
    dtypes = ", ".join(f"{dtype} {format_bytes(count)}" for dtype, count in document["bytes_by_dtype"].items())
    fields: list[tuple[str, object]] = [("checkpoint", document["path"])]
    if document["model_type"]:
        fields.append(("model type", document["model_type"]))
    for place in document["layout"]:
        fields.append((f"moses's {place.get('kind')}", place.get("path")))
    fields += [
        ("tensors", f"{document['num_tensors']}, {document['num_values']:,} values"),
        ("bytes", f"{format_bytes(document['bytes'])} ({dtypes or NOTHING})"),
    ]
    print_fields(fields)
    print()
    print_table(
        "files",
        ["name", "bytes", "tensors"],
        [[file["name"], format_bytes(file["bytes"]), file["tensors"]] for file in document["files"]],
    )
    if "layers" in document:
        _show_experts(document)
    groups: dict[tuple[str, str, str], list[Document]] = {}
    for tensor in document["tensors"]:
        shape = " x ".join(map(str, tensor["shape"])) or "one value"
        groups.setdefault((_NUMBER.sub("*", tensor["name"]), tensor["dtype"], shape), []).append(tensor)
    rows = [
        [name, dtype, shape, len(group), format_bytes(sum(tensor["bytes"] for tensor in group))]
        for (name, dtype, shape), group in groups.items()
    ]
    print_table("tensors", ["name", "dtype", "shape", "count", "bytes"], rows, num_text=3)


def _show_experts(document: Document) -> None:
    """The layers with experts: a row for each run of layers that are alike."""
    groups: dict[tuple[object, ...], list[Document]] = {}
    for layer in document["layers"]:
        gate = layer["gates"][0]
        shape = " x ".join(map(str, gate["shape"]))
        key = (_NUMBER.sub("*", layer["layer"]), layer["layout"], f"{gate['dtype']} {shape}", layer["experts"])
        groups.setdefault(key, []).append(layer)
    rows = [[*key, len(group), format_bytes(group[0]["expert_bytes"])] for key, group in groups.items()]
    token = f"experts, {document['top_k'] or NOTHING} a token"
    if document["groups"] > 1:
        token += f" of {document['groups']} groups"
    print_table(token, ["layers", "layout", "gate", "experts", "count", "an expert"], rows, num_text=3)
    if document["superseded"]["tensors"]:
        stale = document["superseded"]
        print_fields(
            [("stale", f"{stale['tensors']} tensors, {format_bytes(stale['bytes'])}: hidden by a later shard")]
        )
