"""Momentum contrast: moving averages of the networks, queues of their features, the loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Similarities(NamedTuple):
    """Of `B` pairs with `B` momentum features of the batch and `Q` of the queue, `[B, B + Q]`.

    Attributes:
        image_to_text: online images with momentum texts, divided by the temperature.
        text_to_image: online texts with momentum images.
        image_to_text_m: momentum images with momentum texts, no gradient.
        text_to_image_m: momentum texts with momentum images, no gradient.
    """

    image_to_text: Tensor
    text_to_image: Tensor
    image_to_text_m: Tensor
    text_to_image_m: Tensor


@torch.no_grad()
def update_momentum(online: nn.Module, twin: nn.Module, momentum: float) -> None:
    """Moves every weight of `twin` in place: `twin = momentum * twin + (1 - momentum) * online`."""
    slow: list[Tensor] = list(twin.parameters())
    fast = [f.to(s.device) for s, f in zip(slow, online.parameters(), strict=True)]
    torch._foreach_mul_(slow, momentum)
    torch._foreach_add_(slow, fast, alpha=1.0 - momentum)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, features: Tensor) -> None:
    """Overwrites the columns of `queue` from `pointer` on, in place, starting over at its end.

    Args:
        queue: `[D, Q]`.
        pointer: `[1]` int64, the first column to overwrite; not moved here, as the queues of
            images and texts share it.
        features: `[B, D]`; of more than `Q` the last ones are kept. In place of a row with NaN or
            infinity the column stays as it is: one bad sample would spoil every later batch.
    """
    size = queue.shape[1]
    columns = (pointer + torch.arange(len(features), device=queue.device))[-size:] % size
    new = features[-size:].T.to(queue.device, queue.dtype)
    queue[:, columns] = torch.where(new.isfinite().all(0), new, queue[:, columns])


def contrastive_loss(similarities: Similarities, alpha: float) -> Tensor:
    """Mean of both directions of the image-text contrastive loss (ALBEF, arXiv:2107.07651, eq. 6).

    The target of a row is its own pair with weight `1 - alpha` and the softmax of the momentum
    networks' similarities with weight `alpha`.
    """
    directions = (
        (similarities.image_to_text, similarities.image_to_text_m),
        (similarities.text_to_image, similarities.text_to_image_m),
    )
    terms = []
    for logits, logits_m in directions:
        target = alpha * logits_m.softmax(dim=1)
        target.diagonal().add_(1.0 - alpha)
        terms.append(functional.cross_entropy(logits, target))
    return (terms[0] + terms[1]) / 2
