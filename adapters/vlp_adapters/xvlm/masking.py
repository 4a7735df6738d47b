"""Masked-language-modelling inputs made from plain captions."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

IGNORED = -100  # label of positions that the loss leaves out
_REPLACED, _RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay as they are (BERT)


def mask_tokens(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    mask_token_id: int,
    vocab_size: int,
    special_ids: Collection[int] = (),
    probability: float = 0.25,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses tokens to predict: 80% become the mask token, 10% a random word, 10% stay.

    Every caption gets `round(probability * its ordinary tokens)` targets, at least one, so that
    short captions train too. Unlike the original, the number per caption has no upper limit and
    whole words are not kept together.

    Args:
        input_ids: `[B, L]` int64.
        attention_mask: `[B, L]`, 1 for real tokens.
        mask_token_id: id of the mask token.
        vocab_size: random words are ids below it that are not special.
        special_ids: ids that are neither chosen nor drawn ([CLS], [SEP], [PAD], ...).
        probability: share of the ordinary tokens of a caption to predict, in (0, 1].
        generator: CPU generator; None for the global one.

    Returns:
        `mlm_input_ids` and `mlm_labels`, both `[B, L]` int64 on the device of `input_ids`;
        labels are -100 where nothing is to be predicted.

    Raises:
        ValueError: if `probability` is outside (0, 1] or every id below `vocab_size` is special.
    """
    if not 0.0 < probability <= 1.0:
        raise ValueError(f"probability is {probability}; it must be above 0 and at most 1")
    special = torch.tensor(sorted({*special_ids, mask_token_id}))
    words = torch.arange(vocab_size)
    words = words[~torch.isin(words, special)]
    if not len(words):
        raise ValueError(f"all {vocab_size} ids of the vocabulary are special: nothing to predict")

    ids = input_ids.cpu()
    ordinary = attention_mask.cpu().bool() & ~torch.isin(ids, special)
    chosen = _choose(ordinary, probability, generator)
    labels = torch.where(chosen, ids, IGNORED)

    fate = torch.rand(ids.shape, generator=generator)
    random_words = words[torch.randint(len(words), ids.shape, generator=generator)]
    replaced = torch.where(chosen & (fate < _REPLACED + _RANDOM), random_words, ids)
    masked = replaced.masked_fill(chosen & (fate < _REPLACED), mask_token_id)
    return masked.to(input_ids.device), labels.to(input_ids.device)


def _choose(ordinary: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """A bool tensor `[B, L]` with the right number of random `ordinary` positions per row."""
    available = ordinary.sum(dim=1, keepdim=True)
    count = (available * probability).round().clamp(min=1)
    order = torch.rand(ordinary.shape, generator=generator).masked_fill(~ordinary, 2.0)
    rank = order.argsort(dim=1).argsort(dim=1)
    return ordinary & (rank < count)
