"""Experts over threads: each thread computes whole experts, every product on one thread.

A product of one expert is too small to be split well (measured in bfloat16, 500 rows an expert, two threads: 1.1 times one thread), while experts do
not depend on each other. So what an expert gives also does not depend on the number of threads. Where one expert has most of the rows there
is nothing to share out, and products are split by torch as ever.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import torch

from .products import Slice

MIN_ROWS = 256  # of all experts: below, handing over costs more than it saves
MAX_SHARE = 1.2  # of the fullest group, to the mean

_crews: dict[int, ThreadPoolExecutor] = {}
_lock = Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_crews.clear)  # threads do not live on in a child


def groups(parts: Sequence[Slice], threads: int) -> list[Sequence[Slice]]:
    """The experts in order, as many groups as threads and of much the same number of rows; one group where that cannot be."""
    rows = sum(part.padded for part in parts)
    if threads < 2 or rows < MIN_ROWS or len(parts) < threads:
        return [parts]
    found: list[list[Slice]] = [[] for _ in range(threads)]
    before = 0
    for part in parts:
        middle = before + part.padded / 2
        found[min(threads - 1, int(middle * threads / rows))].append(part)
        before += part.padded
    fullest = max(sum(part.padded for part in group) for group in found)
    return [group for group in found if group] if fullest * threads <= MAX_SHARE * rows else [parts]


def run(work: Callable[[Sequence[Slice], int], None], parts: Sequence[Slice]) -> None:
    """Call `work(group, threads)` for every group: its experts, and the threads that it may use."""
    if not parts:
        return
    threads = torch.get_num_threads()
    shared = groups(parts, threads)
    if len(shared) == 1:
        work(parts, threads)
        return

    def alone(group: Sequence[Slice]) -> None:
        with torch.no_grad():
            work(group, 1)

    for _ in _crew(threads).map(alone, shared):
        pass


def _crew(threads: int) -> ThreadPoolExecutor:
    with _lock:
        crew = _crews.get(threads)
        if crew is None:
            crew = ThreadPoolExecutor(threads, "moses-experts", lambda: torch.set_num_threads(1))
            barrier = Barrier(threads)
            for _ in crew.map(lambda _: barrier.wait(), range(threads)):  # all are there
                pass
            torch.set_num_threads(threads)  # a thread that set its own number set that of threads to come, too
            _crews[threads] = crew
        return crew
