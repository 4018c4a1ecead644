"""The kernels' very text, as it rides in the extension, compiled for the host and run thread by thread in a random order."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import torch

from moses import _core
from moses.cuda.names import KERNELS

SHIM = Path(__file__).with_name("shim.h")
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-shared", "-fPIC", "-Wall", "-Werror")
ARGUMENTS = 13
GUARD = 4096  # bytes around every argument; all ones are a NaN, and an index that no kernel takes


class RefusedError(Exception):
    """A thread found an index out of range: on a device, an asynchronous assert."""


def compile_kernels(folder):
    """Every kernel by name, with the library it is in."""
    kernels = {}
    for name, names in KERNELS.items():
        source, library = folder / f"{name}.cpp", folder / f"{name}.so"
        source.write_text(f'#include "{SHIM}"\n' + _core.cuda_source(name))
        subprocess.run([COMPILER, *FLAGS, "-o", library, source], check=True)
        loaded = ctypes.CDLL(str(library))
        loaded.moses_run.restype = ctypes.c_char_p
        kernels |= {kernel: (loaded, ctypes.cast(getattr(loaded, kernel), ctypes.c_void_p)) for kernel in names}
    return kernels


class Host:
    """Takes the place of `launch`. `grid` is (blocks, threads across, threads down, seed); None takes the launch's own."""

    def __init__(self, kernels, grid=None):
        self.kernels, self.grid, self.started = kernels, grid, []

    def __call__(self, kernel, blocks, threads, device, *arguments):
        assert blocks >= 1 and 1 <= threads[0] * threads[1] <= 1024
        self.started.append(kernel)
        seed = 0
        if self.grid is not None:
            blocks, across, down, seed = self.grid
            threads = (across, down if threads[1] > 1 else 1)
        places = list(range(blocks * threads[0] * threads[1]))
        random.Random(seed).shuffle(places)
        order = (ctypes.c_longlong * len(places))(*places)
        guarded = [Guarded(argument) if isinstance(argument, torch.Tensor) else None for argument in arguments]
        words = [guard.address if guard else argument or 0 for guard, argument in zip(guarded, arguments, strict=True)]
        library, function = self.kernels[kernel]
        values = (ctypes.c_longlong * ARGUMENTS)(*words)
        refused = library.moses_run(function, values, order, *map(ctypes.c_longlong, (blocks, *threads)))
        for guard in filter(None, guarded):
            guard.take_back(kernel)
        if refused:
            raise RefusedError(refused.decode())


class Guarded:
    """A tensor's memory between guards, at the same place within 16 bytes; kernels may write to nothing else."""

    def __init__(self, tensor):
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.tensor, self.size = tensor, extent * tensor.element_size() if tensor.numel() else 0
        self.memory = ctypes.create_string_buffer(b"\xff" * (self.size + 2 * GUARD + 32))
        begin = ctypes.addressof(self.memory)
        self.lead = GUARD + (tensor.data_ptr() - begin - GUARD) % 16
        self.address = begin + self.lead
        ctypes.memmove(self.address, tensor.data_ptr(), self.size)

    def take_back(self, kernel):
        raw = self.memory.raw[:-1]
        outside = raw[: self.lead] + raw[self.lead + self.size :]
        assert outside.count(b"\xff") == len(outside), f"{kernel} writes outside of its arguments"
        ctypes.memmove(self.tensor.data_ptr(), self.address, self.size)
