"""Banks of experts beside frozen linear maps and FFNs, seen through a task's masks (MoSEs, arXiv 2511.06237)."""

from .element import ElementBank
from .ffn import SubExpertFFN
from .layer import Bank, Gates, SubExpertLayer, make_bank
from .linear import SubExpertLinear
from .rank import RankBank

__all__ = [
    "Bank",
    "ElementBank",
    "Gates",
    "RankBank",
    "SubExpertFFN",
    "SubExpertLayer",
    "SubExpertLinear",
    "make_bank",
]
