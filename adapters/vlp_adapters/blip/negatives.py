"""Hard negatives of the matching loss, drawn by contrastive similarity."""

from __future__ import annotations

import torch
from torch import Tensor

from vlp_plugins.adapter import Negatives

_FLOOR = 1e-4  # keeps every other pair of the batch possible, as in the original


@torch.no_grad()
def draw_negatives(
    image_to_text: Tensor, text_to_image: Tensor, generator: torch.Generator | None = None
) -> tuple[list[int], list[int]]:
    """Draws for every text a similar wrong image, then for every image a similar wrong text.

    One draw per row on the CPU generator, images first: the order of the original code, so that
    equal seeds give equal negatives.

    Args:
        image_to_text: `[N, B]` similarities of the first `N` images with the texts of the batch.
        text_to_image: `[N, B]` similarities of the first `N` texts with the images of the batch.
        generator: CPU generator; None for the global one.

    Returns:
        Row numbers of the negative images (one per text) and of the negative texts (one per image).

    Raises:
        ValueError: if the batch has fewer than two pairs.
    """
    if text_to_image.shape[1] < 2:
        raise ValueError(
            "the matching loss needs a wrong partner in the batch, which has "
            f"{text_to_image.shape[1]} pair(s); use batches of at least 2 or leave 'itm' out of "
            "losses"
        )
    return _draw_rows(text_to_image, generator), _draw_rows(image_to_text, generator)


def check_negatives(negatives: Negatives, rows: int) -> None:
    """Checks that both lists are of the same length, at most `rows`, and name rows of the batch.

    Raises:
        ValueError: if not.
    """
    images, texts = ([int(row) for row in chosen] for chosen in negatives)
    fitting = 0 < len(images) == len(texts) <= rows
    if not fitting or not all(0 <= row < rows for row in images + texts):
        raise ValueError(
            f"negative images {images} and negative texts {texts} do not fit a batch of {rows} "
            f"pairs: give as many of both, at most {rows}, with row numbers from 0 to {rows - 1}"
        )


def _draw_rows(similarities: Tensor, generator: torch.Generator | None) -> list[int]:
    weights = similarities.softmax(dim=1) + _FLOOR
    weights.fill_diagonal_(0.0)
    return [int(torch.multinomial(row, 1, generator=generator)) for row in weights.cpu()]
