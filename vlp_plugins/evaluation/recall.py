"""Recall at k of a matrix of similarities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlp_plugins.runtime.errors import DataError

# Rows of the similarity matrix that are compared at a time: bounds the temporaries.
_BLOCK = 512


@dataclass(frozen=True)
class Recall:
    """Recall at k in per cent.

    Attributes:
        image_to_text: by k, the share of images that find one of their texts among the first k.
        text_to_image: by k, the share of texts that find their image among the first k.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    @property
    def mean(self) -> float:
        """Mean over both directions and every k."""
        values = [*self.image_to_text.values(), *self.text_to_image.values()]
        return sum(values) / len(values)

    def as_dict(self) -> dict[str, float]:
        """`image_to_text_r1`, ..., `text_to_image_r10`, `mean`; per cent."""
        ways = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        named = {f"{way}_r{k}": value for way, by_k in ways.items() for k, value in by_k.items()}
        return named | {"mean": self.mean}


def recall_at_k(
    similarity: Tensor, targets: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> Recall:
    """Recall at k both ways.

    A wrong partner that is as similar as the right one counts as ahead of it, and so does NaN:
    a collapsed model, whose features are all alike, finds nothing.

    Args:
        similarity: float `[I, T]`, images by texts.
        targets: integer `[T]`, the image that each text describes; None if text i describes
            image i (then I = T). Every image has at least one text.
        ks: cut-offs.

    Raises:
        DataError: if targets do not fit, or a cut-off is below 1.
    """
    images, texts = similarity.shape
    if targets is None:
        targets = torch.arange(texts, device=similarity.device)
    targets = targets.to(similarity.device)
    _check_targets(targets, images, texts)
    if not ks or min(ks) < 1:
        raise DataError(f"recall at k needs cut-offs from 1 on, not {list(ks)}")
    ahead_of_text = torch.zeros(texts, dtype=torch.int64, device=similarity.device)
    ahead_of_image = torch.empty(images, dtype=torch.int64, device=similarity.device)
    own_of_text = similarity[targets, torch.arange(texts, device=similarity.device)]
    for start in range(0, images, _BLOCK):
        rows = similarity[start : start + _BLOCK]
        numbers = torch.arange(start, start + len(rows), device=similarity.device)
        own = targets[None, :] == numbers[:, None]
        best = rows.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        ahead_of_image[start : start + len(rows)] = (~own & ~(rows < best)).sum(dim=1)
        ahead_of_text += (~own & ~(rows < own_of_text)).sum(dim=0)
    return Recall(
        {k: 100 * float((ahead_of_image < k).double().mean()) for k in ks},
        {k: 100 * float((ahead_of_text < k).double().mean()) for k in ks},
    )


def _check_targets(targets: Tensor, images: int, texts: int) -> None:
    if targets.shape != (texts,):
        raise DataError(f"targets are {list(targets.shape)}; there are {texts} texts")
    found = torch.unique(targets)
    if found.numel() != images or int(found[0]) != 0 or int(found[-1]) != images - 1:
        raise DataError(
            f"targets name {found.numel()} different images; each of the {images} needs a text"
        )
