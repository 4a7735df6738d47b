"""`vlp prune` from end to end: load, read the data once, make masks, write a folder of results."""

from __future__ import annotations

from vlp_plugins.job.prepared import Prepared, prepare, title_of
from vlp_plugins.job.running import Result, leftovers, run

__all__ = ["Prepared", "Result", "leftovers", "prepare", "run", "title_of"]
