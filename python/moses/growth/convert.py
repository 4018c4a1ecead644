"""From a model's name to an upcycled folder: what `moses upcycle` does. All input is checked before anything is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .folder import require_free, save_model

logger = logging.getLogger(__name__)


def upcycle_to_folder(
    source: str,
    out: str | Path,
    *,
    num_experts: int = 8,
    every: int | None = None,
    layers: Sequence[int] | None = None,
    top_k: int = 2,
    router: str = "topk",
    noise: float = 0.0,
    reinit: float = 0.0,
    keep_dense: bool = False,
    seed: int = 0,
    dtype: str = "auto",
    say: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Upcycle the model `source` (a folder, a hub name or an alias) into the new folder `out`.

    Args:
        num_experts, every, layers, top_k, router, noise, reinit, keep_dense, seed: as `upcycle`.
        dtype: as `load_model`.
        say: takes a line of progress.

    Returns:
        `difference` (the largest of the logits on a few tokens, in parts of the largest logit; None with noise),
        `model_type` (of transformers, or `moses`), `why_moses`, `blocks`, `experts`, `top_k`, `parameters` and `parameters_before`, `path`.

    Raises:
        MosesError: as `upcycle`, `load_model` and `save_model`.
    """
    from transformers import AutoConfig, AutoTokenizer

    from ..models import ALIASES, load_model
    from .ffns import dense_ffns
    from .layout import describe
    from .upcycle import check_settings, choose, class_for, upcycle_plan, upcycled

    check_settings(num_experts, every, layers, top_k, router, noise, reinit, keep_dense, seed)
    folder = require_free(out)
    say(f"loading {source}")
    model, _, _ = load_model(source, dtype)
    ffns = dense_ffns(model)
    chosen = choose(ffns, every, layers)
    numbers = ", ".join(str(ffn.index) for ffn in chosen)
    say(f"making {num_experts} experts of the FFN in blocks {numbers}")
    # load_model gives every tokenizer a pad token; what is written is what was there
    place = str(ALIASES[source]()) if source in ALIASES else source
    tokenizer = AutoTokenizer.from_pretrained(place)
    model.config.pad_token_id = AutoConfig.from_pretrained(place).pad_token_id
    plan = upcycle_plan(chosen, num_experts, top_k, noise, seed)
    exact = keep_dense or not (noise or reinit)
    made, difference = upcycled(model, ffns, chosen, plan, router, reinit, keep_dense, exact)
    why = class_for(model, ffns, chosen, num_experts, top_k)[1] or f"its router is {router}"
    own = bool(describe(made))
    say(f"writing {folder}")
    save_model(made, folder, tokenizer)
    return {
        "path": str(folder),
        "model_type": "moses" if own else made.config.model_type,
        "why_moses": ("its FFN stays beside the experts" if keep_dense else why) if own else None,
        "blocks": [ffn.index for ffn in chosen],
        "experts": num_experts,
        "difference": difference,
        "top_k": top_k,
        "parameters_before": sum(part.numel() for part in model.parameters()),
        "parameters": sum(part.numel() for part in made.parameters()),
    }
