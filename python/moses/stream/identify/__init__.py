"""Which task a prompt belongs to (TaIL): features of the frozen base model, and what is kept of every task.

Read in this order: `prompts` (what is shown), `features` (what the model makes of it), `lift` (random features),
`ridge`, `cosine`, `prompt_loss` (one kind of identifier each), `identifier` (the composer: adds, removes, infers). Only
`features` needs torch.
"""

from __future__ import annotations

from moses.stream.identify.config import Identification, IdentifierConfig
from moses.stream.identify.features import features_of_encoded, layer_features, prompt_features
from moses.stream.identify.identifier import TaskIdentifier
from moses.stream.identify.prompts import prompt_views, without_template

__all__ = [
    "Identification",
    "IdentifierConfig",
    "TaskIdentifier",
    "features_of_encoded",
    "layer_features",
    "prompt_features",
    "prompt_views",
    "without_template",
]
