"""Folders of models: what `save_pretrained` writes where a class of transformers holds the model, else moses's own.

moses's own folder has `moses_model.json` (format version, config, layout) and `model.safetensors`, beside the tokenizer's files and no
`config.json`: `from_pretrained` must not mistake it for the dense model and fill the experts' places with random weights. A folder appears whole
or not at all, with files that a group can read. Nothing in it is or contains pickle, and loading runs no code of it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import FormatError, ModelError, StoreError
from ..tensorfile import TensorFile

DESCRIPTION = "moses_model.json"
WEIGHTS = "model.safetensors"
FORMAT = "moses-model"
FORMAT_VERSION = 1
MAX_DESCRIPTION_BYTES = 16 << 20  # a layout of 10,000 blocks is some 4 MB
_FLOATS = {"F64", "F32", "BF16", "F16"}
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64"}


def is_model_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder of moses's own kind."""
    return (Path(path) / DESCRIPTION).is_file()


def require_free(path: str | Path) -> Path:
    """The path of a folder to be written. Raises `StoreError` (`folder_exists`) where something is there already."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder}: is there already; give another folder, or delete it", code="folder_exists")
    if not folder.absolute().parent.is_dir():
        raise StoreError(f"{folder}: there is no folder {folder.absolute().parent}; make it", code="no_parent_folder")
    return folder


def save_model(model: Any, path: str | Path, tokenizer: Any = None) -> Path:
    """Write a model, its generation config and the tokenizer; the folder appears when all of it is on the disk.

    Raises:
        StoreError: `folder_exists`, `no_parent_folder`.
        FormatError: `cannot_hold`: the model has modules that neither a class nor the layout describes.
    """
    from ..models import quiet
    from .layout import describe

    folder = require_free(path)
    places = describe(model)
    document = None if not places else _document(model, places)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        if document is None:
            with quiet():
                model.save_pretrained(partial)
            _name_numbers_twice(partial / "config.json")
        else:
            _write_own(model, partial, document)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            file.chmod(0o644)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        _appear(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _appear(partial: Path, folder: Path) -> None:
    partial.chmod(0o755)
    if folder.is_dir():
        folder.rmdir()  # it was empty; where it no longer is, this fails and nothing is lost
    partial.rename(folder)
    parent = os.open(folder.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _name_numbers_twice(file: Path) -> None:
    """Versions of transformers differ in what they call the number of experts, and one that misses it takes its default."""
    config = json.loads(file.read_text())
    number = config.get("num_experts", config.get("num_local_experts"))
    if number is not None and config.get("model_type") in ("qwen3_moe", "qwen2_moe"):
        config |= {"num_experts": number, "num_local_experts": number}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _document(model: Any, places: list[dict[str, Any]]) -> dict[str, Any]:
    """The description, checked: the model that it makes has the tensors of this one."""
    from .layout import own_names

    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # where it was loaded from says nothing to others
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "architecture": type(model).__name__,
        "dtype": config["dtype"],
        "config": config,
        "layout": places,
    }
    mine = {name: tuple(tensor.shape) for name, tensor in own_names(model).items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in own_names(_skeleton(document, "meta")).items()}
    odd = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    if odd:
        raise FormatError(
            f"a folder cannot hold {odd[0]} {mine.get(odd[0], 'which is not there')}, where {document['architecture']} and its layout have "
            f"{theirs.get(odd[0], 'nothing')}; take out what was attached",
            code="cannot_hold",
        )
    return document


def _write_own(model: Any, folder: Path, document: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    from .layout import own_names

    tensors = {name: tensor.detach().contiguous() for name, tensor in own_names(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    (folder / DESCRIPTION).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


def load_folder(path: str | os.PathLike[str]) -> Any:
    """The model in a folder of moses's own, in evaluation mode on the CPU, to the same bits.

    Raises:
        FormatError: `not_moses_model`, `unknown_version`, `damaged_layout`, `damaged_tensors`: files that do not fit each other or the format.
    """
    from safetensors import safe_open
    from torch import nn

    from .layer import follow_tokens
    from .layout import own_names

    folder = Path(path)
    document = _read(folder / DESCRIPTION)
    header = TensorFile.open(folder / WEIGHTS)
    _require_small(folder, document, len(header.tensors))
    expected = own_names(_skeleton(document, "meta"))
    for name in sorted({*expected, *header.tensors}):
        want, have = expected.get(name), header.tensors.get(name)
        if want is None or have is None or tuple(want.shape) != have.shape:
            raise FormatError(
                f"{folder / WEIGHTS}: has {'no' if have is None else list(have.shape)} {name}, and {DESCRIPTION} says "
                f"{'none' if want is None else list(want.shape)}; restore the folder from a copy",
                code="damaged_tensors",
            )
        if (have.dtype in _FLOATS) != want.is_floating_point() or have.dtype not in _DTYPES:
            raise FormatError(f"{folder / WEIGHTS}: {name} is of dtype {have.dtype}", code="damaged_tensors")
    model = _skeleton(document, "cpu")
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in expected}, strict=False, assign=True)
    model.tie_weights()
    if _require_tables(folder, model):
        follow_tokens(model)
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
    assert isinstance(model, nn.Module)
    return model.eval()


def load_with_tokenizer(path: str | Path, dtype: Any = "auto") -> tuple[Any, Any]:
    """The model in a folder of moses's own, in another dtype where one is named, and its tokenizer, which always has a pad token.

    Raises:
        FormatError: as `load_folder`.
        ModelError: `model_unreadable`, `no_pad_token`: the folder has no tokenizer, or one that cannot pad.
    """
    import torch
    from transformers import AutoTokenizer

    from ..models import padded

    model = load_folder(path)
    if dtype != "auto":
        model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    try:
        tokenizer = padded(str(path), AutoTokenizer.from_pretrained(path))
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{path}: cannot load the tokenizer: {error}; copy the tokenizer's files into it", code="model_unreadable"
        ) from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FormatError(
            f"{file.parent}: has no {DESCRIPTION}; give a folder that moses wrote", code="not_moses_model"
        )
    if file.stat().st_size > MAX_DESCRIPTION_BYTES:
        raise FormatError(
            f"{file}: is above {MAX_DESCRIPTION_BYTES} bytes; restore it from a copy", code="json_too_large"
        )
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: not JSON ({error}); restore it from a copy", code="json_damaged") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FormatError(f"{file}: is no description of a model; restore it from a copy", code="not_moses_model")
    if document.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{file}: format version {document.get('format_version')!r}, this moses reads {FORMAT_VERSION}; take a newer moses",
            code="unknown_version",
        )
    kinds = {"architecture": str, "dtype": str, "config": dict, "layout": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(document.get(name), kind)]
    if wrong or document["dtype"] not in _DTYPES.values() or not all(isinstance(p, dict) for p in document["layout"]):
        raise FormatError(
            f"{file}: field {(wrong or ['layout'])[0]} is wrong; restore it from a copy", code="damaged_layout"
        )
    return document


def _require_small(folder: Path, document: dict[str, Any], num_tensors: int) -> None:
    """A model with more blocks than the file has tensors is not built to be compared."""
    counts = [
        value for name, value in document["config"].items() if name in ("num_hidden_layers", "n_layer", "num_layers")
    ]
    if any(not isinstance(count, int) or not 0 <= count <= num_tensors for count in counts):
        raise FormatError(
            f"{folder / DESCRIPTION}: {counts} blocks, and {num_tensors} tensors in {WEIGHTS}", code="damaged_layout"
        )


def _skeleton(document: dict[str, Any], device: str) -> Any:
    """The model of a description, its weights not initialised."""
    import torch
    import transformers
    from transformers import CONFIG_MAPPING, PreTrainedModel
    from transformers.initialization import no_init_weights

    from .layout import arrange

    try:
        fields = dict(document["config"])
        config = CONFIG_MAPPING[str(fields.get("model_type"))].from_dict(fields)
        kind = getattr(transformers, document["architecture"], None)
        if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
            raise FormatError(f"{DESCRIPTION}: no model class {document['architecture']!r}", code="damaged_layout")
        make: Any = kind
        with torch.device(device), no_init_weights():
            model = make._from_config(config, dtype=getattr(torch, document["dtype"]))
            model.tie_weights()  # which no_init_weights leaves out
            model.config.architectures = [document["architecture"]]
            arrange(model, document["layout"])
    except FormatError:
        raise
    except Exception as error:  # outside data: transformers raises almost any class for a config that it cannot build
        reason = " ".join(str(error).split())[:300]
        raise FormatError(
            f"{DESCRIPTION}: cannot build {document['architecture']}: {type(error).__name__}: {reason}",
            code="damaged_layout",
        ) from None
    return model


def _require_tables(folder: Path, model: Any) -> bool:
    """Whether the model routes by tables, whose experts are all there."""
    from ..routers import RandomRouter

    for path, module in model.named_modules():
        if isinstance(module, RandomRouter) and module.table.numel():
            low, high = int(module.table.min()), int(module.table.max())
            if low < 0 or high >= module.num_experts:
                raise FormatError(
                    f"{folder / WEIGHTS}: {path}.table names expert {low if low < 0 else high} of {module.num_experts}",
                    code="damaged_tensors",
                )
    return any(isinstance(module, RandomRouter) for module in model.modules())
