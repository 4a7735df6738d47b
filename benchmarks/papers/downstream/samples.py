"""Fixed sets of scenes with captions and questions; fine-tuning can draw fresh ones instead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo.language import Fact
from benchmarks.papers.downstream.questions import Question, ask
from benchmarks.papers.downstream.scenes import draw
from benchmarks.papers.downstream.splits import Split, scans_of, seed_of
from benchmarks.papers.downstream.wording import caption

SIZES: dict[Split, int] = {"train": 6000, "dev": 500, "test": 1000}
CAPTIONS = 3  # of an image
QUESTIONS = 2


@dataclass(frozen=True)
class Sample:
    """Scenes with words.

    Attributes:
        images: uint8 `[n, 3, 48, 48]`.
        facts: what each scene shows.
        captions: three different sentences about each; none is true of another scene here.
        questions: two different questions about each.
    """

    images: Tensor
    facts: list[frozenset[Fact]]
    captions: list[tuple[str, ...]]
    questions: list[tuple[Question, ...]]

    def __len__(self) -> int:
        return len(self.facts)


def draw_sample(split: Split, count: int | None = None, seed: int = 0) -> Sample:
    """The scenes of a split.

    Args:
        split: whose handwriting to use.
        count: how many scenes; None for the usual number.
        seed: another one draws other scenes of the same kind (fresh ones for every run).

    Raises:
        ValueError: if `count` is not positive, or so large that scenes must repeat each other.
    """
    number = seed_of(split, seed)
    generator = torch.Generator().manual_seed(number)
    scenes = draw(SIZES[split] if count is None else count, scans_of(split), generator)
    rng = np.random.default_rng(number)
    captions = [_captions(facts, rng) for facts in scenes.facts]
    questions = [_questions(facts, rng) for facts in scenes.facts]
    return Sample(scenes.images, scenes.facts, captions, questions)


def _captions(facts: frozenset[Fact], rng: np.random.Generator) -> tuple[str, ...]:
    said: dict[str, None] = {}
    while len(said) < CAPTIONS:
        said[caption(facts, rng)] = None
    return tuple(said)


def _questions(facts: frozenset[Fact], rng: np.random.Generator) -> tuple[Question, ...]:
    asked: dict[str, Question] = {}
    while len(asked) < QUESTIONS:
        question = ask(facts, rng)
        asked.setdefault(question.text, question)
    return tuple(asked.values())
