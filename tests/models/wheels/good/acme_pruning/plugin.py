"""The hooks. The adapter is imported when it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from acme_pruning.closeness import ClosenessToMean
from vlp_plugins.extend import Adapter, Scorer, hookimpl


@hookimpl
def vlp_scorers() -> Mapping[str, Callable[..., Scorer]]:
    """One score."""
    return {ClosenessToMean.name: ClosenessToMean}


@hookimpl
def vlp_adapters() -> Mapping[str, Callable[[], Adapter]]:
    """One model family."""
    return {"two_towers": _two_towers}


def _two_towers() -> Adapter:
    from acme_pruning.two_towers import TwoTowersAdapter

    return TwoTowersAdapter()
