"""The short fine-tuning after cutting: the pre-training loss on fresh pairs, the same for all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo import captions
from benchmarks.demo.families import training_losses
from benchmarks.demo.processors import Family
from benchmarks.demo.scans import load_scans
from benchmarks.demo.scenes import draw
from benchmarks.demo.train import build_optimizer, descend

WARM_UP_STEPS = 8
MATCHING_EVERY = 4


@dataclass(frozen=True)
class Tuning:
    """How the cut model is trained.

    Attributes:
        steps: of AdamW.
        pairs: fresh training pairs of a step.
        rate: peak learning rate, after a short warm-up; half a cosine from there.
    """

    steps: int = 60
    pairs: int = 64
    rate: float = 5e-4

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, from 0."""
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        return self.rate * warm_up * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def batches(self, seed: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Images uint8 `[pairs, 3, 48, 48]` and captions of each step; the seed alone decides."""
        scans = load_scans("pretrain")
        generator = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        for _ in range(self.steps):
            scenes = draw(self.pairs, scans, generator)
            yield scenes.images, [captions.write(facts, rng) for facts in scenes.facts()]


def fine_tune(model: Any, family: Family, tokenizer: Any, tuning: Tuning, seed: int) -> None:
    """Trains a model in place, its matching loss at every fourth step; evaluation mode after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # hard negatives and masked words
        model.train()
        optimizer = build_optimizer(model)
        for step, (images, texts) in enumerate(tuning.batches(seed)):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * tuning.rate_at(step)
            matching = step % MATCHING_EVERY == 0
            losses = training_losses(family, model, tokenizer, images, texts, matching=matching)
            descend(model, optimizer, losses)
        model.eval()
