"""Hard negatives of BLIP's matching loss, drawn by contrastive similarity."""

from __future__ import annotations

import torch
from torch import Tensor

from vlp_adapters.negatives import draw_partners

_FLOOR = 1e-4  # of the original


def draw_negatives(
    image_to_text: Tensor, text_to_image: Tensor, generator: torch.Generator | None = None
) -> tuple[list[int], list[int]]:
    """Draws for every text a similar wrong image, then for every image a similar wrong text.

    Args:
        image_to_text: `[N, B]` similarities of the first `N` images with the texts of the batch.
        text_to_image: `[N, B]` similarities of the first `N` texts with the images of the batch.
        generator: CPU generator; None for the global one.

    Returns:
        Row numbers of the negative images (one per text) and of the negative texts (one per image).

    Raises:
        ValueError: if the batch has fewer than two pairs.
    """
    images = draw_partners(text_to_image, _FLOOR, generator)
    return images, draw_partners(image_to_text, _FLOOR, generator)
