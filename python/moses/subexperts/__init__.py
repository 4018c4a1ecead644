"""Banks of low-rank experts beside frozen linear maps, seen through a task's masks (MoSEs, arXiv 2511.06237)."""

from .element import ElementBank
from .linear import Bank, SubExpertLinear, make_bank
from .rank import RankBank

__all__ = ["Bank", "ElementBank", "RankBank", "SubExpertLinear", "make_bank"]
