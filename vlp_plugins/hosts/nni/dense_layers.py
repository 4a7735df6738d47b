"""Layers that a `config_list` selects and that are not pruned: why, and how to say so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

from vlp_plugins.models.adapter import Adapter


def reason_of(parameters: Sequence[str], model: nn.Module, adapter: Adapter) -> str:
    """Why none of the parameters of a layer is pruned.

    Args:
        parameters: their paths.
        model: of the layer.
        adapter: of the model.
    """
    names = [name for name in parameters if not name.endswith(".bias")] or [*parameters]
    for exclusion in adapter.exclusions(model) if names else ():
        if re.search(exclusion.pattern, names[0]):
            return exclusion.reason
    return "it has no weight" if not names else f"adapter {adapter.name!r} does not prune it"


def examples_of(dense: Mapping[str, str]) -> str:
    """By reason one layer, and how many more there are: `: a.b and 3 more (embedding)`."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in dense.items():
        by_reason.setdefault(reason, []).append(path)
    parts = [
        f"{paths[0]}{f' and {len(paths) - 1} more' if len(paths) > 1 else ''} ({reason})"
        for reason, paths in by_reason.items()
    ]
    return f": {', '.join(parts)}" if parts else ""
