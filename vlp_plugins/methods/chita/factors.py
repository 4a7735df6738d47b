"""Factors of the weights' importance in CHITA: they weigh the magnitudes that fill the blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from vlp_plugins.methods.chita.settings import Settings
from vlp_plugins.runtime.errors import UnsupportedError
from vlp_plugins.scoring.factors import Factors, guided_name
from vlp_plugins.solvers.solve import check_importance

if TYPE_CHECKING:
    from vlp_plugins.methods.chita.procedure import Chita
    from vlp_plugins.methods.chita.stages import ChitaInStages


def with_factors(method: Chita | ChitaInStages, factors: Mapping[str, float]) -> dict[str, Any]:
    """What changes in a method that gets factors.

    Raises:
        UnsupportedError: if it has some.
    """
    if method.factors is not None:
        raise UnsupportedError(f"method {method.name!r} has factors already")
    factors = Factors.of(factors)
    return {
        "name": guided_name(method.name),
        "factors": factors,
        "allocation": method.allocation.with_factors(factors),
    }


def check_factors(factors: Factors | None, settings: Settings, names: Iterable[str]) -> None:
    """Makes sure, before gradients are taken, that factors can be used.

    Args:
        factors: None: nothing to check.
        settings: of the variant.
        names: of all weights.

    Raises:
        UnsupportedError: if there are no blocks to share weights out among.
        StatisticsError: if a weight has no factor.
    """
    if factors is None:
        return
    check_importance(True, settings.effort, settings.columns_of_block)
    factors.check(names)
