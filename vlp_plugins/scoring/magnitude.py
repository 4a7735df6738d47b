"""Scores that need no data: magnitude |w|, magnitude relative to the layer's norm, random."""

from __future__ import annotations

import hashlib
from typing import ClassVar

import torch

from vlp_plugins.scoring.score import Evidence, Scorer, in_range


class Magnitude(Scorer):
    """Magnitude: remove the smallest weights; the score of the method `omp`."""

    name: ClassVar[str] = "magnitude"
    elementwise: ClassVar[bool] = True

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return weight.float().abs()


def layer_l2(weight: torch.Tensor) -> torch.Tensor:
    """|w| / ||W||_F of each element.

    Args:
        weight: `[out, in]`, any floating dtype.

    Returns:
        float32, same shape; zeros for a tensor of zeros.
    """
    magnitude = in_range(weight.float().abs())
    norm = torch.linalg.vector_norm(magnitude)
    return magnitude / norm if norm > 0 else torch.zeros_like(magnitude)


class LayerL2(Scorer):
    """Magnitude over the l2 norm of the layer (Farina et al., CVPR 2024, section A.1)."""

    name: ClassVar[str] = "l2"

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return layer_l2(weight)


class Random(Scorer):
    """Random weights, for comparison: drawn from the seed and the name of the layer.

    The draw does not depend on the order of the weights, on the device or on the process. Factors
    multiply it like any score: `id*random` removes by the factors, at random inside a layer.
    """

    name: ClassVar[str] = "random"

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        digest = hashlib.sha256(f"{evidence.seed}:{evidence.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(weight.shape, generator=generator).to(weight.device)
