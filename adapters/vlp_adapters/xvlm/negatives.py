"""Hard negatives of the matching loss, drawn by contrastive similarity."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-5  # keeps every other pair of the batch possible, as in the original


def draw_negatives(
    image_features: Tensor,
    text_features: Tensor,
    temperature: Tensor | float,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """Draws for every text a similar wrong image, then for every image a similar wrong text.

    One draw per row on the CPU generator, images first: the order of the original code, so that
    equal seeds give equal negatives.

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
    if len(image_features) < 2:
        raise ValueError(
            f"the matching loss needs a wrong partner in the batch, which has {len(image_features)}"
            " pair(s); use batches of at least 2 or leave 'itm' out of losses"
        )
    with torch.no_grad():
        similarity = (text_features @ image_features.T / temperature).float()
        images = _draw_rows(similarity, generator)
        texts = _draw_rows(similarity.T, generator)
    return images, texts


def _draw_rows(similarity: Tensor, generator: torch.Generator | None) -> list[int]:
    weights = similarity.softmax(dim=1) + _FLOOR
    weights.fill_diagonal_(0.0)
    return [int(torch.multinomial(row, 1, generator=generator)) for row in weights.cpu()]
