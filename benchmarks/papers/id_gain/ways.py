"""The methods that are compared, with parameters that let all of them end within minutes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlp_plugins.models.discovery import registry

PLAIN, FACTOR, BUDGETS = "plain", "id*", "id budgets"
ARMS = (PLAIN, FACTOR, BUDGETS)

LAMBDA = 1e-8
"""Of CHITA: near what `--lambda auto` chooses for these models (`benchmarks.demo.chita`)."""
SAME_AS_OTHERS = ("magnitude",)
"""Scores that are a method under another name, `omp`."""


@dataclass(frozen=True)
class Way:
    """A method and how it is run.

    Attributes:
        method: registered name.
        parameters: of the method.
        batch_size: of the calibration pairs. CHITA makes a row of every batch: many small ones
            serve it best.
        samples: calibration pairs at most; None: all of a seed.
    """

    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 32
    samples: int | None = None

    def options(self, arm: str) -> dict[str, Any]:
        """What `prune` is given in one of the `ARMS`."""
        if arm == PLAIN:
            return {"method": self.method}
        if arm == FACTOR:
            return {"method": f"id*{self.method}"}
        return {"method": self.method, "allocation": "id"}


_KNOWN = {
    "snip": Way("snip", {}, 8, 256),
    "itersnip": Way("itersnip", {"rounds": 4, "batches_per_round": 4}, 8, 256),
    "tamt": Way("tamt", {"steps": 24}, 8, 256),
    "taylor": Way("taylor", {"steps": 32}, 8, 256),
    "platon": Way("platon", {"steps": 32}, 8, 256),
    "chita": Way("chita", {"lambda": LAMBDA}, 4, 128),
    "chita++": Way("chita++", {"lambda": LAMBDA, "rounds": 2}, 4, 128),
}


def ways(methods: list[str] | None = None) -> list[Way]:
    """One per registered method, ours and outsiders', or per method named."""
    names = methods or [n for n in registry().method_names() if n not in SAME_AS_OTHERS]
    return [_KNOWN.get(name, Way(name)) for name in names]
