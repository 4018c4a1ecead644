"""Routers: which experts a token goes to. `forward(x)` gives a `RouterOutput`; one file a rule, each with its paper and equations.

DenseRouter         every expert, softmax                       Jacobs et al. 1991
NoisyTopKRouter     top-k of noisy logits                       Shazeer et al. 2017
GShardRouter        top-2, the second at random                 Lepikhin et al. 2020
SwitchRouter        top-1                                       Fedus et al. 2021
TopKRouter          top-k with the choices of present models    Mixtral, Qwen, OLMoE, DeepSeek-V3, GptOss
ExpertChoiceRouter  experts choose tokens                       Zhou et al. 2022
RandomRouter        a fixed table of token ids and domains      PanGu-Sigma, Ren et al. 2023
TaskRouter          a router a task                             MoSEs, Kang 2025
"""

from __future__ import annotations

from .base import Router
from .dense import DenseRouter
from .expert_choice import ExpertChoiceRouter
from .gshard import GShardRouter
from .noisy_topk import NoisyTopKRouter
from .random import RandomRouter
from .switch import SwitchRouter
from .task import TaskRouter
from .topk import TopKRouter
from .topk_of import save_routes

__all__ = [
    "DenseRouter",
    "ExpertChoiceRouter",
    "GShardRouter",
    "NoisyTopKRouter",
    "RandomRouter",
    "Router",
    "SwitchRouter",
    "TaskRouter",
    "TopKRouter",
    "save_routes",
]
