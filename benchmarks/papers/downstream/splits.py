"""Which handwriting each downstream split shows: no scan is in two of them.

Training shares its scans with pre-training, as COCO is in the pre-training data of real models.
The test has the scans that `benchmarks.demo` calls downstream: pre-training never trained on them,
and its own test figures, by which methods may have been chosen, never saw them. Development, which
is for choosing, has the scans of that pre-training test.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from benchmarks.demo import scans
from benchmarks.demo.scans import Scans

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")

_SCANS: dict[Split, scans.Split] = {"train": "pretrain", "dev": "test", "test": "downstream"}


def scans_of(split: Split) -> Scans:
    """The scans of a downstream split.

    Raises:
        ValueError: if there is no such split.
    """
    if split not in _SCANS:
        raise ValueError(f"unknown split {split!r}; use 'train', 'dev' or 'test'")
    return scans.load_scans(_SCANS[split])


def seed_of(split: Split, seed: int) -> int:
    """A seed for each split, so that no two splits repeat each other's choices."""
    return 3 * seed + SPLITS.index(split)


def pick(source: Scans, digits: Tensor, generator: torch.Generator) -> Tensor:
    """A random scan of every digit: float32 `[*digits.shape, 8, 8]`, 0 (paper) to 1 (ink)."""
    chosen = torch.empty_like(digits)
    for digit, members in enumerate(source.by_digit):
        here = digits == digit
        number = torch.randint(len(members), (int(here.sum()),), generator=generator)
        chosen[here] = members[number]
    return source.images[chosen]
