"""Parts of the losses that BLIP's pre-training and downstream classes have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from vlp_plugins.adapter import Negatives

IGNORED = -100


def matching_loss(
    match: Callable[[Tensor, Tensor, Tensor], Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    image_embeds: Tensor,
    negatives: Negatives,
) -> Tensor:
    """Cross-entropy of N true pairs, N (negative image, text), N (image, negative text).

    Args:
        match: ids, mask and image tokens of as many pairs to logits `[pairs, 2]`.
        input_ids: `[B, L]` int64.
        attention_mask: `[B, L]`, 1 for real tokens.
        image_embeds: `[B, T, Dv]`.
        negatives: of the first N pairs, for every text an image and for every image a text.
    """
    images = torch.as_tensor(negatives[0], device=image_embeds.device)
    texts = torch.as_tensor(negatives[1], device=image_embeds.device)
    pairs = len(images)
    own = torch.arange(pairs, device=image_embeds.device)
    text_rows = torch.cat([own, own, texts])
    logits = match(
        input_ids[text_rows],
        attention_mask[text_rows],
        image_embeds[torch.cat([own, images, own])],
    )
    target = torch.zeros(3 * pairs, dtype=torch.long, device=logits.device)
    target[:pairs] = 1
    return functional.cross_entropy(logits, target)


def word_labels(input_ids: Tensor, attention_mask: Tensor, pad_token_id: int) -> Tensor:
    """The words to predict, `[B, L]`: the ids, and `IGNORED` where there is padding."""
    real = (attention_mask != 0) & (input_ids != pad_token_id)
    return input_ids.masked_fill(~real, IGNORED)
