"""Streams whose task boundaries are hidden: where the distribution changes, and whether what comes is known already.

Read in this order: `config` (settings), `signals` (how far a sequence is from what is usual), `detector` (when that is a
change, and where it began), `returning` (which earlier task it is), `scoring` (against the true boundaries).
"""

from .config import DriftConfig
from .detector import DriftDetector
from .returning import recognise
from .scoring import DriftScore, score_changes

__all__ = ["DriftConfig", "DriftDetector", "DriftScore", "recognise", "score_changes"]
