"""The kernels of `cuda/*.cu` by name, as the macros at the end of each source make them."""

from __future__ import annotations

INDICES = ("int32", "int64")
UNITS = (16, 8, 4, 2)  # bytes that a thread copies at once
PACKS = {"float32": 4, "float64": 2, "bfloat16": 8, "float16": 8}  # items in 16 bytes
KERNELS = {
    "dispatch": tuple(
        [f"plan_rank_{key}" for key in INDICES]
        + [f"plan_{step}_{key}_{index}" for step in ("move", "place") for key in INDICES for index in INDICES]
        + [f"plan_rows_{index}" for index in INDICES]
    ),
    "combine": tuple(
        [f"gather_{unit}_{index}" for unit in UNITS for index in INDICES]
        + [
            f"{kernel}_{dtype}_x{items}_{index}"
            for kernel in ("combine", "scale", "dot")
            for dtype, pack in PACKS.items()
            for items in (1, pack)
            for index in INDICES
        ]
        + ["fold_float32", "fold_float64"]
    ),
}
