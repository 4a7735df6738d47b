"""Mask training that starts from another score than the magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlp_plugins.methods.base import Context
from vlp_plugins.methods.tamt.procedure import Tamt
from vlp_plugins.methods.tamt.training import Scores
from vlp_plugins.scorers.base import Evidence
from vlp_plugins.scorers.lamp import Lamp
from vlp_plugins.targets import Target


@dataclass(frozen=True)
class StartedByLamp(Tamt):
    """TAMT whose first mask is LAMP's: trained scores start at half the logarithm of LAMP's.

    LAMP's score is a square of magnitudes, so that a step means the same as in TAMT.
    """

    name: ClassVar[str] = "tamt-from-lamp"  # type: ignore[misc]

    def _scores(self, context: Context, dense: dict[str, torch.Tensor], target: Target) -> Scores:
        scores = super()._scores(context, dense, target)
        lamp = Lamp()
        for name, values in scores.values.items():  # type: ignore[attr-defined]
            found = lamp.score(dense[name], Evidence(name, context.seed)).float()
            values.copy_(found.clamp_min(torch.finfo(torch.float32).tiny).log().div_(2))
        return scores
