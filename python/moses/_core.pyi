"""The Rust core of moses: masks, the registry, and the run folder.

Every call that does work releases the GIL. Buffers are any contiguous buffer (bytes, memoryview, numpy array); they are
not copied, and must not be written to during the call. Errors are `moses.errors` with a stable `code`; those of the
operating system are `OSError`.
"""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self, final

from typing_extensions import Buffer

__all__ = [
    "Block",
    "Checkpoint",
    "FileInfo",
    "LayerInfo",
    "Mask",
    "Registry",
    "SpaceInfo",
    "Store",
    "SurgeryJob",
    "TaskInfo",
    "atomic_write",
    "blake3_hex",
    "combine",
    "combine_backward_rows",
    "combine_backward_weights",
    "compare_checkpoints",
    "cuda_source",
    "dispatch_plan",
    "error_codes",
    "gate_backward",
    "gate_forward",
    "gather",
    "hash_buffers",
    "pool_bytes",
    "pool_clear",
    "safetensors_header",
]

@final
class Mask:
    """Which units of a space are selected: immutable, of fixed length (at most 2^28 units), held compressed.

    Set algebra (`|`, `&`, `-`) takes masks of equal length, else `RegistryError` (`mask_lengths_differ`). Equal masks
    have equal bytes and hashes. True where at least one unit is selected.
    """

    @staticmethod
    def from_indices(length: int, indices: Buffer | Iterable[int]) -> Mask:
        """The mask of `length` units that selects `indices`, in any order; numpy's 32 and 64 bit integers are fastest.

        Raises `RegistryError` (`mask_index`, `limit_exceeded`).
        """

    @staticmethod
    def from_bool(selected: Buffer) -> Mask:
        """The mask that selects the units whose byte is not zero: bool or uint8, any shape in C order."""

    @staticmethod
    def empty(length: int) -> Mask:
        """The mask that selects nothing."""

    @staticmethod
    def full(length: int) -> Mask:
        """The mask that selects everything."""

    @staticmethod
    def from_bytes(data: Buffer) -> Mask:
        """Reads what `to_bytes` wrote. Raises `FormatError`."""

    def to_bytes(self) -> bytes:
        """The mask in the smallest of six encodings: at most about a bit a unit."""

    def to_bool(self) -> bytes:
        """One byte a unit: `np.frombuffer(mask.to_bool(), bool)`."""

    def to_indices(self) -> bytes:
        """The selected units, ascending: `np.frombuffer(mask.to_indices(), "<u8")`."""

    def resized(self, length: int) -> Mask:
        """The same units out of `length`. Raises `RegistryError` (`mask_shrinks`) where that is less."""

    @property
    def length(self) -> int:
        """Units that could be selected."""

    @property
    def count(self) -> int:
        """Units that are selected."""

    @property
    def density(self) -> float:
        """`count / length`; 0 for a mask without units."""

    @property
    def nbytes(self) -> int:
        """`len(to_bytes())`."""

    def __or__(self, other: Mask, /) -> Mask: ...
    def __ror__(self, other: Mask, /) -> Mask: ...
    def __and__(self, other: Mask, /) -> Mask: ...
    def __rand__(self, other: Mask, /) -> Mask: ...
    def __sub__(self, other: Mask, /) -> Mask: ...
    def __rsub__(self, other: Mask, /) -> Mask: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __contains__(self, index: int, /) -> bool: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> bool: ...
    def __copy__(self) -> Self: ...
    def __deepcopy__(self, _memo: Any, /) -> Self: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

@final
class SpaceInfo:
    """What masks of a layer select from: units, expert by expert."""

    @property
    def name(self) -> str:
        """`components`, or `A` and `B`."""

    @property
    def units_per_expert(self) -> int:
        """Units of one expert."""

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit's values."""

    @property
    def length(self) -> int:
        """Units of all experts: the length of this space's masks."""

    def __eq__(self, other: object, /) -> bool: ...

@final
class LayerInfo:
    """A place in the model where experts live."""

    @property
    def id(self) -> int:
        """Never given again."""

    @property
    def name(self) -> str:
        """A module path, unique."""

    @property
    def expert_ids(self) -> list[int]:
        """The experts in the order of the bank; ids are unique over the registry."""

    @property
    def spaces(self) -> list[SpaceInfo]:
        """In the order that the layer was added with."""

    def __eq__(self, other: object, /) -> bool: ...

@final
class TaskInfo:
    """A live task."""

    @property
    def id(self) -> int:
        """Never given again."""

    @property
    def name(self) -> str:
        """Unique among live tasks."""

    @property
    def domain(self) -> str | None:
        """As `begin_task` was told."""

    @property
    def state(self) -> Literal["open", "ended"]:
        """`open` while it is trained."""

    @property
    def content_hash(self) -> str | None:
        """As `set_content_hash` was told."""

    def __eq__(self, other: object, /) -> bool: ...

@final
class Registry:
    """The ledger: layers, experts, tasks, masks, history.

    Ids are never given twice. The owner of a unit is the live task with the lowest id that uses it; a unit's value is
    stored with its owner. A task's values are in canonical order: by layer id, by space in the layer's order, by unit
    ascending. Every method may raise `RegistryError`, whose message says which argument and how to mend it; then
    nothing has changed. Safe to share between threads.
    """

    def __new__(cls) -> Self: ...
    def add_layer(self, name: str, num_experts: int, spaces: Sequence[tuple[str, int, int]]) -> int:
        """Adds a layer; spaces are `(name, units_per_expert, unit_bytes)`. The result is its id."""

    def add_experts(self, layer: int, count: int) -> list[int]:
        """Grows every space of a layer at its end; old masks stay valid. The result is the new experts' ids."""

    def layers(self) -> list[LayerInfo]:
        """The layers, by id."""

    def begin_task(self, name: str, domain: str | None = None) -> int:
        """Opens a task; at most one is open, and names of live tasks are unique. The result is its id."""

    def end_task(self, task: int, masks: Sequence[tuple[int, str, Mask]]) -> None:
        """Ends the open task with the units that it uses, `(layer, space, mask)`; what is missing is empty."""

    def narrow_task(self, task: int, kept: Sequence[tuple[int, str, Mask]]) -> None:
        """Takes units away from an ended task: of each `(layer, space, mask)` it keeps those in the mask, what is missing stays.

        Its content hash is cleared.
        """

    def abandon_task(self, task: int) -> None:
        """Gives up the open task; its id is not given again."""

    def forget_task(self, task: int) -> list[tuple[int, str, Mask]]:
        """Removes an ended task. The result is what is freed: the units that no other live task uses."""

    def tasks(self) -> list[TaskInfo]:
        """The live tasks, by id."""

    def task(self, name: str) -> TaskInfo:
        """The live task of this name."""

    def history(self) -> list[str]:
        """What happened, oldest first; by ids, so that the name of a forgotten task is gone."""

    def mask(self, task: int, layer: int, space: str) -> Mask:
        """The units that a task uses."""

    def used(self, layer: int, space: str) -> Mask:
        """The units that any live task uses."""

    def free(self, layer: int, space: str) -> Mask:
        """The units that no live task uses."""

    def owned(self, task: int, layer: int, space: str) -> Mask:
        """The units that a task owns."""

    def exclusive(self, task: int, layer: int, space: str) -> Mask:
        """The units that only this task uses: what forgetting it would free."""

    def reference_counts(self, layer: int, space: str) -> bytes:
        """By how many live tasks each unit is used: `np.frombuffer(..., "<u4")`."""

    def new_bytes(self, task: int) -> int:
        """Bytes of the values of the units that a task owns: what it added to the run."""

    def used_bytes(self) -> int:
        """Bytes of the values of all used units."""

    def total_bytes(self) -> int:
        """Bytes of the values of the whole bank."""

    def bank_fraction(self) -> float:
        """`used_bytes / total_bytes`; 0 without layers."""

    def mask_bytes(self, task: int) -> int:
        """Bytes that a task's masks take in `to_bytes`."""

    def overlap(self) -> list[list[int]]:
        """Bytes that each pair of live tasks shares, in the order of `tasks()`; on the diagonal what each uses."""

    def assemble(self, task: int, owned_values: Mapping[int, Buffer]) -> bytes:
        """A task's flat vector out of the flat vectors of owned units, by owner's id; more than it needs are fine."""

    def content_hash(self, task: int, owned_values: Mapping[int, Buffer]) -> str:
        """The BLAKE3 hash of `assemble`, as 64 hexadecimal digits."""

    def set_content_hash(self, task: int, hash: str) -> None:  # noqa: A002
        """Notes the hash of an ended task's values."""

    def to_bytes(self) -> bytes:
        """The registry as a file: versioned, checksummed; equal registries have equal bytes."""

    @staticmethod
    def from_bytes(data: Buffer) -> Registry:
        """Reads what `to_bytes` wrote, and validates it. Raises `FormatError`."""

    def validate(self) -> None:
        """Checks every invariant. Raises `FormatError` (`registry_inconsistent`)."""

    def __eq__(self, other: object, /) -> bool: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

@final
class FileInfo:
    """What the manifest says of a file."""

    @property
    def path(self) -> str:
        """Relative to the run folder."""

    @property
    def bytes(self) -> int:
        """Its size."""

    @property
    def blake3(self) -> str:
        """The hash of its content."""

    def __eq__(self, other: object, /) -> bool: ...

@final
class Store:
    """A run folder: files with one commit point, `manifest.json`. A crash leaves the old files or the new, never a mix.

    A context manager. One writer at a time; readers never wait.
    """

    @staticmethod
    def create(path: str | PathLike[str]) -> Store:
        """Makes a run of generation 0 (the folder too) and opens it for writing.

        Raises `StoreError` (`store_exists`, `store_locked`).
        """

    @staticmethod
    def open(path: str | PathLike[str], write: bool = False) -> Store:
        """Opens a run; a writer first clears what an unfinished commit left.

        Raises `FileNotFoundError` where there is no folder, `StoreError` (`not_a_run`, `store_locked`), `FormatError`
        (`manifest_invalid`, `format_version`).
        """

    def close(self) -> None:
        """Ends the use of the run and lets the lock go; again is fine."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
        /,
    ) -> None: ...
    @property
    def generation(self) -> int:
        """The number of commits that made what is there."""

    @property
    def recovered(self) -> str | None:
        """One sentence, where an unfinished commit was cleared away when the run was opened."""

    def files(self) -> dict[str, FileInfo]:
        """The files, by name."""

    def read(self, name: str) -> bytes:
        """A file's content, checked against its hash.

        Raises `StoreError` (`file_unknown`, `file_missing`; `store_changed` where a writer moved the run on),
        `FormatError` (`file_damaged`).
        """

    def path(self, name: str) -> str:
        """Where a file lies, absolute."""

    def commit(self, put: Mapping[str, Buffer], delete: Sequence[str] = ()) -> int:
        """Puts and deletes files, all or none; the result is the new generation. A failed commit leaves the old state.

        Raises `StoreError` (`store_read_only`, `file_name_invalid`, `file_unknown`, `path_taken`, `commit_not_durable`,
        `commit_unknown`) and `OSError`.
        """

    def verify(self) -> list[tuple[str, str, str]]:
        """What is wrong with the files: `(name, code, message)`; empty where nothing is."""

def atomic_write(path: str | PathLike[str], data: Buffer) -> None:
    """Replaces the file at `path`: whatever happens, the old content or the new is there. Mode 0644 less the umask."""

def safetensors_header(
    path: str | PathLike[str],
) -> tuple[dict[str, tuple[str, list[int], int, int]], dict[str, str]]:
    """The tensors of a safetensors file, `(dtype, shape, begin, end)` by name, and its metadata.

    Strict: sizes, holes and overlaps are checked, no data is read. Raises `FormatError` (`safetensors_invalid`).
    """

def blake3_hex(buffer: Buffer) -> str:
    """The BLAKE3 hash of a buffer as 64 hexadecimal digits."""

def hash_buffers(buffers: Sequence[tuple[str, Buffer]]) -> str:
    """The fingerprint of named tensors: names, lengths and bytes count, their order does not.

    Raises `RegistryError` (`name_given_twice`).
    """

def error_codes() -> dict[str, str]:
    """Every code of the core, with the name of its class in `moses.errors`."""

@final
class Block:
    """`size` bytes of memory from a pool, as a writable buffer aligned to 64; it goes back when nothing refers to it.

    Raises `DispatchError` (`out_of_memory`).
    """

    def __new__(cls, size: int) -> Self: ...
    def __len__(self) -> int: ...

def cuda_source(name: str) -> str:
    """The text of `cuda/NAME.cu`, `dispatch` or `combine`, behind that of `cuda/device.cuh`. Raises `KeyError`."""

def pool_bytes() -> int:
    """Bytes of free memory that the pool keeps, at most 1 GiB."""

def pool_clear() -> int:
    """Gives the pool's free memory back to the system; the result is its bytes."""

def dispatch_plan(
    expert_ids: Buffer,
    top_k: int,
    num_experts: int,
    capacity: int | None,
    pad: bool,
    order: Buffer,
    inverse: Buffer,
    offsets: Buffer,
    counts: Buffer,
    threads: int,
) -> None:
    """Writes the plan of (T, k) integers of 8 to 64 bits into `order` and `inverse` (int32), `offsets` and `counts` (int64).

    Outputs are contiguous, writable and no memory of another argument. Raises `DispatchError` (`expert_id_range`,
    `dispatch_arguments`, `out_of_memory`), `BufferError`.
    """

def gather(x: Buffer, row_bytes: int, order: Buffer, inverse: Buffer, top_k: int, out: Buffer, threads: int) -> None:
    """`moses::gather` on rows of `row_bytes` bytes; `order` and `inverse` are int32.

    Raises `DispatchError` (`dispatch_arguments`, `plan_index`), `BufferError`.
    """

def combine(
    dtype: str,
    y: Buffer,
    width: int,
    order: Buffer,
    inverse: Buffer,
    top_k: int,
    weights: Buffer | None,
    out: Buffer,
    threads: int,
) -> None:
    """`moses::combine` on rows of `width` items of `dtype`, bfloat16 and float16 as 16-bit integers; None weighs each by 1.

    Raises as `gather`.
    """

def combine_backward_rows(
    dtype: str,
    grad: Buffer,
    width: int,
    order: Buffer,
    inverse: Buffer,
    top_k: int,
    weights: Buffer,
    out: Buffer,
    threads: int,
) -> None:
    """`moses::combine_backward_y`, as `combine`."""

def combine_backward_weights(
    dtype: str,
    grad: Buffer,
    y: Buffer,
    width: int,
    order: Buffer,
    inverse: Buffer,
    top_k: int,
    out: Buffer,
    threads: int,
) -> None:
    """`moses::combine_backward_weights`, as `combine`."""

def gate_forward(
    dtype: str,
    form: tuple[float, float],
    hidden: Buffer,
    start: int,
    rows: int,
    width: int,
    out: Buffer,
    threads: int,
) -> None:
    """act(gate) * up of the hidden rows (gate, up) from `start` on, each half `width` items of `dtype`, into `out`'s first rows.

    act(g) = g * sigmoid(a * g + b * g^3) for the form (a, b), in float32, rounded once. 16-bit floats come as 16-bit integers.
    Raises `DispatchError` (`dispatch_arguments`), `BufferError`.
    """

def gate_backward(
    dtype: str,
    form: tuple[float, float],
    hidden: Buffer,
    start: int,
    rows: int,
    width: int,
    grad: Buffer,
    out: Buffer,
    grad_hidden: Buffer,
    threads: int,
) -> None:
    """With `grad` for what `gate_forward` gives: that again into `out`, and the hidden rows' gradient into `grad_hidden`."""

@final
class Checkpoint:
    """A checkpoint folder of transformers, opened and checked from its headers alone."""

    @staticmethod
    def open(path: str | PathLike[str]) -> Checkpoint:
        """Raises `FormatError` (`checkpoint_invalid`, `shard_path`, `shard_missing`, `shard_extra`, `tensor_missing`, `tensor_unlisted`,
        `weights_pickled`, `experts_misfit`, `safetensors_invalid`), `SurgeryError` (`tensor_unknown`), OSError.
        """

    def describe(self) -> str:
        """Model type, layers with experts, shards, dtypes and bytes, as JSON."""

    def expert_norms(self) -> list[tuple[str, list[float]]]:
        """The Euclidean norm of each expert's weights, by layer; reads them all. Raises `SurgeryError`, OSError."""

@final
class SurgeryJob:
    """Work on checkpoints: a list of byte moves."""

    @staticmethod
    def plan(
        sources: Sequence[Checkpoint],
        plan: str,
        operation: str,
        layout: str | None = None,
        uneven: bool = False,
        in_place: bool = False,
    ) -> SurgeryJob:
        """Plan by the JSON of a `SurgeryPlan`; nothing is read but headers. Raises `SurgeryError`."""

    @staticmethod
    def upcycle(
        source: Checkpoint,
        model_type: str,
        config: str,
        layers: Sequence[int],
        num_experts: int,
        noise: float,
        seed: int,
        empty: Sequence[tuple[str, Sequence[int]]],
    ) -> SurgeryJob:
        """Plan a mixture from a dense checkpoint: experts are copies of the FFNs of the blocks `layers`, gates are drawn.

        `empty` are tensors of the class that stand for nothing, by block; -1 in a shape is the model's width. Raises `SurgeryError`.
        """

    def describe(self, linked: bool) -> str:
        """Tensors by fate, shards, files, bytes read and written, notes, as JSON."""

    def run(
        self,
        out: str | PathLike[str],
        link: bool = False,
        hash: bool = False,  # noqa: A002
        progress: Any = None,
    ) -> tuple[Any, int]:
        """Do it: the output's folder as a path, and the bytes of its shards that were written.

        `progress(done, total)` is called some times a second; what it raises stops the work. Raises `SurgeryError`, OSError;
        then nothing is left behind.
        """

def compare_checkpoints(
    out: Checkpoint, sources: Sequence[Checkpoint], plan: str
) -> tuple[int, int, int, int, list[tuple[str, str]]]:
    """Whether `out` is what the plan makes of `sources`: tensors, experts and gate rows that are the same, new experts, problems."""
