"""Random scores: the control that every method must beat."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import torch

from vlp_plugins.scorers.base import Evidence, Scorer


class Random(Scorer):
    """Independent uniform scores, drawn per weight from the seed and the canonical name.

    The draw does not depend on the order of the weights, on the device or on the process. Factors
    multiply it like any score: `id*random` removes by the factors, at random inside a layer.
    """

    name: ClassVar[str] = "random"

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        digest = hashlib.sha256(f"{evidence.seed}:{evidence.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
