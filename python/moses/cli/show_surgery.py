"""What surgery did, or would do, as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moses.cli.output import print_fields, print_table
from moses.report.text import format_bytes
from moses.surgery.plan import SurgeryPlan

MAX_LAYERS = 8
MAX_SLOTS = 12


def show_surgery(document: Mapping[str, Any], plan: SurgeryPlan) -> None:
    """A plan that was carried out, or, without a path, one that was not."""
    rows = []
    for part in plan.layers[:MAX_LAYERS]:
        slots = " ".join(map(str, part.slots[:MAX_SLOTS]))
        more = f" and {len(part.slots) - MAX_SLOTS} more" if len(part.slots) > MAX_SLOTS else ""
        rows.append([part.layer, slots + more, part.before, "dense" if part.dense else len(part.slots)])
    if rows:
        more = f" (the first {MAX_LAYERS} of {len(plan.layers)})" if len(plan.layers) > MAX_LAYERS else ""
        print_table(f"experts{more}", ["layer", "after", "before", "count"], rows, num_text=2)
    counts = ", ".join(f"{count} {fate}" for fate, count in sorted(document["tensors"].items()) if count)
    shards = f"{len(document['shards'])}, {document['unchanged_shards']} unchanged"
    fields: list[tuple[str, object]] = [
        ("tensors", counts),
        ("shards", shards),
        ("reads", format_bytes(document["bytes_read"])),
        ("writes", format_bytes(document["bytes_written"])),
    ]
    seconds = document["seconds"]
    if document["path"] is None:
        fields.append(("time", "unknown" if seconds is None else f"about {seconds:.1f} s at this disk's speed now"))
    else:
        speed = document["bytes_written"] / max(seconds, 1e-9) / 1e9
        fields.append(("time", f"{seconds:.2f} s, {speed:.2f} GB/s"))
    fields += [("note", note) for note in document["notes"]]
    fields.append(("result", document["path"] or "nothing was written (dry run)"))
    print_fields(fields)
