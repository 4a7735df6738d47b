"""Masked words: which are chosen, and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlp_adapters.objectives import IGNORED
from vlp_adapters.xvlm import mask_tokens


def test_mask_tokens_predicts_ordinary_tokens_only() -> None:
    ids = torch.tensor([[1, 10, 11, 12, 13, 14, 15, 16, 17, 2], [1, 20, 21, 2, 0, 0, 0, 0, 0, 0]])
    mask = (ids != 0).long()
    generator = torch.Generator().manual_seed(0)
    masked, labels = mask_tokens(
        ids, mask, mask_token_id=3, vocab_size=30, special_ids=(0, 1, 2), generator=generator
    )
    target = labels != IGNORED
    assert target.sum(dim=1).tolist() == [2, 1]  # a quarter of 8; at least one of 2
    assert torch.equal(labels[target], ids[target])
    assert torch.equal(masked[~target], ids[~target])
    assert not target[ids < 3].any()


def test_mask_tokens_follows_80_10_10_and_its_generator() -> None:
    ids = torch.randint(4, 1000, (50, 200), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"mask_token_id": 3, "vocab_size": 1000, "probability": 0.5}
    first, labels = mask_tokens(
        ids, torch.ones_like(ids), generator=torch.Generator().manual_seed(5), **options
    )
    again, _ = mask_tokens(
        ids, torch.ones_like(ids), generator=torch.Generator().manual_seed(5), **options
    )
    target = labels != IGNORED
    assert torch.equal(first, again)
    assert target.float().mean().item() == 0.5
    assert (first[target] == 3).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (first[target] == ids[target]).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_mask_tokens_leaves_an_empty_caption_alone() -> None:
    ids = torch.tensor([[1, 2, 0]])
    masked, labels = mask_tokens(
        ids, torch.tensor([[1, 1, 0]]), mask_token_id=3, vocab_size=9, special_ids=(0, 1, 2)
    )
    assert torch.equal(masked, ids)
    assert (labels == IGNORED).all()


@pytest.mark.parametrize("probability", [0.0, 1.5])
def test_mask_tokens_refuses_a_wrong_probability(probability: float) -> None:
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        mask_tokens(ids, ids, mask_token_id=3, vocab_size=9, probability=probability)
