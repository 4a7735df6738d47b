"""Parts of the pre-training losses that the image-text families have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlp_adapters.inputs import need_partners
from vlp_adapters.negatives import generator_of
from vlp_plugins.models.adapter import Negatives

IGNORED = -100
"""Label of positions that a loss of words leaves out."""


def losses_of_pairs(
    model: Any, pairs: tuple[Tensor, Tensor, Tensor], **options: Any
) -> dict[str, Tensor]:
    """The losses of a pre-training model, by name; its draws depend on the texts alone.

    Args:
        model: returns a `PretrainOutput`.
        pairs: see `pairs_of`.
        options: of its forward.

    Raises:
        BatchError: if there are fewer than two pairs.
    """
    pixels, ids, mask = pairs
    need_partners(len(ids))
    output = model(
        pixel_values=pixels,
        input_ids=ids,
        attention_mask=mask,
        generator=generator_of(ids),
        **options,
    )
    return dict(output.losses)


def similarity(features: Tensor, others: Tensor, temperature: Tensor) -> Tensor:
    """`features [B, D] @ others [D, M] / temperature`, never in less than float32."""
    exact = torch.promote_types(features.dtype, torch.float32)
    there = features.device  # the towers of a model may be on several devices
    with torch.autocast(there.type, enabled=False):
        return features.to(exact) @ others.to(there, exact) / temperature.to(there, exact)


def batch_contrastive_loss(similarities: Tensor) -> Tensor:
    """Mean of both directions over `[B, B]` similarities, the pairs on the diagonal."""
    target = torch.arange(len(similarities), device=similarities.device)
    by_image = functional.cross_entropy(similarities, target)
    by_text = functional.cross_entropy(similarities.T, target)
    return (by_image + by_text) / 2


def matching_loss(
    match: Callable[[Tensor, Tensor, Tensor], Tensor],
    texts: Tensor,
    attention_mask: Tensor,
    image_embeds: Tensor,
    negatives: Negatives,
) -> Tensor:
    """Cross-entropy of N true pairs, N (negative image, text), N (image, negative text).

    Args:
        match: texts, mask and image tokens of as many pairs to logits `[pairs, 2]`.
        texts: `[B, L]` ids or `[B, L, D]` states, whichever `match` reads.
        attention_mask: `[B, L]`, 1 for real tokens.
        image_embeds: `[B, T, Dv]`.
        negatives: of the first N pairs, for every text an image and for every image a text.
    """
    wrong_images = torch.as_tensor(negatives[0], device=image_embeds.device)
    wrong_texts = torch.as_tensor(negatives[1], device=image_embeds.device)
    pairs = len(wrong_images)
    own = torch.arange(pairs, device=image_embeds.device)
    rows = torch.cat([own, own, wrong_texts])
    images = image_embeds[torch.cat([own, wrong_images, own])]
    words = rows.to(texts.device)
    logits = match(texts[words], attention_mask[rows.to(attention_mask.device)], images)
    target = torch.zeros(3 * pairs, dtype=torch.long, device=logits.device)
    target[:pairs] = 1
    return functional.cross_entropy(logits, target)
