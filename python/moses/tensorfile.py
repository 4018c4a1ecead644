"""safetensors files without torch: what is in them, from the header alone, and the raw bytes of one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moses import _core


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor: its dtype as the format names it (`BF16`), its shape, and where its bytes lie in the file's data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def num_values(self) -> int:
        """The product of the shape."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file whose header was checked: sizes fit dtypes and shapes, and nothing overlaps or is missing."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Read the header. Raises FormatError for a file that breaks a rule of the format, OSError where it cannot."""
        tensors, metadata = _core.safetensors_header(path)
        infos = {
            name: TensorInfo(dtype, tuple(shape), begin, end) for name, (dtype, shape, begin, end) in tensors.items()
        }
        return cls(Path(path), infos, metadata)

    def read(self, name: str) -> bytes:
        """The bytes of a tensor as they lie in the file. KeyError where there is none of that name."""
        info = self.tensors[name]
        with self.path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            file.seek(8 + header_bytes + info.begin)
            return file.read(info.num_bytes)
