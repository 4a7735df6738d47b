"""Magnitude: |w|."""

from __future__ import annotations

from typing import ClassVar

import torch

from vlp_plugins.scorers.base import Evidence, Scorer


class Magnitude(Scorer):
    """|w|. With global allocation this is one-shot magnitude pruning (OMP)."""

    name: ClassVar[str] = "magnitude"
    elementwise: ClassVar[bool] = True

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return weight.float().abs()
