"""Hard negatives of a matching loss: drawn row by row, checked, reproducible."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from vlp_plugins.models.adapter import Negatives


def draw_negatives(
    image_to_text: Tensor,
    text_to_image: Tensor,
    *,
    floor: float,
    generator: torch.Generator | None = None,
) -> tuple[list[int], list[int]]:
    """Draws for every text a similar wrong image, then for every image a similar wrong text.

    One draw per row on the CPU generator, as the original code bases do, so that equal seeds give
    equal negatives.

    Args:
        image_to_text: `[N, B]` similarities of the first `N` images with the texts of the batch.
        text_to_image: `[N, B]` similarities of the first `N` texts with the images of the batch.
        floor: added to every probability, so that every wrong partner of the batch is possible.
        generator: CPU generator; None for the global one.

    Returns:
        Row numbers of the negative images (one per text) and of the negative texts (one per image).

    Raises:
        ValueError: if the batch has fewer than two pairs.
    """
    images = _draw_partners(text_to_image, floor, generator)
    return images, _draw_partners(image_to_text, floor, generator)


@torch.no_grad()
def _draw_partners(
    similarities: Tensor, floor: float, generator: torch.Generator | None
) -> list[int]:
    """For every row of `[N, B]` a wrong column; the right partner of row n is column n."""
    if similarities.shape[1] < 2:
        raise ValueError(
            "the matching loss needs a wrong partner in the batch, which has "
            f"{similarities.shape[1]} pair(s); use batches of at least 2 or leave 'itm' out of "
            "losses"
        )
    # NaN would stop the draw; it shows in the losses, where somebody can say which batch it was.
    weights = similarities.softmax(dim=1).nan_to_num() + floor
    weights.fill_diagonal_(0.0)
    return [int(torch.multinomial(row, 1, generator=generator)) for row in weights.cpu()]


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


def generator_of(input_ids: Tensor) -> torch.Generator:
    """A CPU generator whose seed is a hash of the shape and the values of `input_ids`.

    Equal batches get equal draws, on any number of processes and after a resumed run, and the
    global random state stays as it was.
    """
    ids = input_ids.detach().to("cpu", torch.int64).contiguous()
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode() + ids.numpy().tobytes()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
