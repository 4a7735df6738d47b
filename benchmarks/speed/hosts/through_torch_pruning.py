"""One method as an importance of Torch-Pruning, on a fresh copy of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.speed.hosts.measured import Subject
from vlp_plugins.errors import VlpError, first_line
from vlp_plugins.hosts.torch_pruning import prune_structured


def works(subject: Subject, method: str, parameters: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether half of the model can be cut by a method, and if not why.

    The cut is checked against the dense model with the same rows and columns at zero (1e-5).
    """
    try:
        result = prune_structured(
            subject.model(), subject.batches, importance=method, ratio=0.5, **parameters
        )
    except VlpError as error:
        return False, first_line(error)
    went = sum(removed for removed, _ in result.removed.values())
    return went > 0 and result.error is not None and result.error <= 1e-5, ""
