"""Hard negatives of X-VLM's matching loss, drawn by contrastive similarity."""

from __future__ import annotations

import torch
from torch import Tensor

from vlp_adapters.negatives import draw_partners

_FLOOR = 1e-5  # of the original


def draw_negatives(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """Draws for every text a similar wrong image, then for every image a similar wrong text.

    Args:
        image_features: `[B, D]`, L2-normalised.
        text_features: `[B, D]`, L2-normalised.
        temperature: divides the similarities.
        generator: CPU generator; None for the global one.

    Returns:
        Row numbers of the negative images (one per text) and of the negative texts (one per image).

    Raises:
        ValueError: if the batch has fewer than two pairs.
    """
    with torch.no_grad():
        similarity = (text_features @ image_features.T / temperature).float()
    images = draw_partners(similarity, _FLOOR, generator)
    return images, draw_partners(similarity.T, _FLOOR, generator)
