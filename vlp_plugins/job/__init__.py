"""`vlp prune` from end to end: load, read the data once, make masks, write a folder of results."""

from __future__ import annotations

from vlp_plugins.job.prepared import Prepared, prepare, resolve_names, title_of
from vlp_plugins.job.running import Result, leftovers, run
from vlp_plugins.job.writing import Finish

__all__ = [
    "Finish",
    "Prepared",
    "Result",
    "leftovers",
    "prepare",
    "resolve_names",
    "run",
    "title_of",
]
