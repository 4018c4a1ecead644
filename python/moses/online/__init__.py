"""Learning a stream in one pass, without its task boundaries (`--boundaries none`).

Read in this order: `config` (settings), `sequences` (the stream with its domains hidden), `learner` (trains one segment), `run`
(opens and ends segments where the drift detector says).
"""

from .config import OnlineConfig, online_config
from .run import run_online
from .sequences import concatenated

__all__ = ["OnlineConfig", "concatenated", "online_config", "run_online"]
