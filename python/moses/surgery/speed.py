"""How long a plan will take, by the disk's speed as it is now."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

SAMPLE_BYTES = 32 << 20
BLOCK_BYTES = 1 << 20


def write_speed(folder: Path) -> float | None:
    """Bytes a second that `folder`'s disk makes durable, by a file without a name; None where nothing can be written there."""
    block = os.urandom(BLOCK_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(SAMPLE_BYTES // BLOCK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return SAMPLE_BYTES / max(time.perf_counter() - start, 1e-9)
    except OSError:
        return None
