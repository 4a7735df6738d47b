"""Magnitude relative to the norm of the layer: |w| / ||W||_F."""

from __future__ import annotations

from typing import ClassVar

import torch

from vlp_plugins.scorers.base import Evidence, Scorer, in_range


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
    """Layer-wise l2 normalisation, compared globally (MULTIFLOW supplementary, section A.1)."""

    name: ClassVar[str] = "l2"

    def score(self, weight: torch.Tensor, evidence: Evidence) -> torch.Tensor:
        return layer_l2(weight)
