"""The handwriting: scikit-learn's 1,797 scans of digits, split three ways by scan.

No scan is shared by two splits, so a model is always tested on handwriting that neither its
pre-training nor its downstream training has seen. Source of the scans: E. Alpaydin, C. Kaynak,
"Optical Recognition of Handwritten Digits", UCI machine learning repository, 1998, CC BY 4.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

Split = Literal["pretrain", "downstream", "test"]

# Fractions of the scans of every digit; the rest is the test split.
PRETRAIN_FRACTION = 0.65
DOWNSTREAM_FRACTION = 0.15
SPLIT_SEED = 20240601


@dataclass(frozen=True)
class Scans:
    """Scans of one split.

    Attributes:
        images: float32 `[n, 8, 8]`, 0 (paper) to 1 (ink).
        digits: int64 `[n]`, the digit that each scan shows.
        by_digit: for each digit 0-9, the int64 indices of its scans.
    """

    images: Tensor
    digits: Tensor
    by_digit: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.digits)


def split_indices(digits: np.ndarray, split: Split) -> np.ndarray:
    """Indices of the scans of one split, stratified by digit.

    Args:
        digits: int `[n]`, the digit of every scan.
        split: which of the three parts.

    Returns:
        Sorted int64 indices. The three parts are disjoint and cover all scans.

    Raises:
        ValueError: if `split` is none of the three names.
    """
    if split not in ("pretrain", "downstream", "test"):
        raise ValueError(f"unknown split {split!r}; use 'pretrain', 'downstream' or 'test'")
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = []
    for digit in range(10):
        members = rng.permutation(np.flatnonzero(digits == digit))
        first = int(PRETRAIN_FRACTION * len(members))
        second = first + int(DOWNSTREAM_FRACTION * len(members))
        bounds = {
            "pretrain": (0, first),
            "downstream": (first, second),
            "test": (second, len(members)),
        }
        start, stop = bounds[split]
        chosen.append(members[start:stop])
    return np.sort(np.concatenate(chosen))


@cache
def load_scans(split: Split) -> Scans:
    """Load the scans of one split (the data ship with scikit-learn, nothing is downloaded)."""
    source = load_digits()
    index = split_indices(source.target, split)
    digits = torch.from_numpy(source.target[index].astype(np.int64))
    images = torch.from_numpy((source.images[index] / 16.0).astype(np.float32))
    by_digit = tuple(torch.nonzero(digits == digit).flatten() for digit in range(10))
    return Scans(images, digits, by_digit)
