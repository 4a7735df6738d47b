"""What each demo model learns: the batches it is shown, its losses, the figures to watch.

`train.train` runs any `Course`; the schedule of what changes on the way is in `schedule`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo import captions, chat, schedule
from benchmarks.demo.conversations import Conversation, converse, describe
from benchmarks.demo.evaluate import evaluate, evaluate_chat
from benchmarks.demo.families import build, training_losses
from benchmarks.demo.language import Fact
from benchmarks.demo.processors import FAMILIES, Family, build_tokenizer, save_processors
from benchmarks.demo.samples import validation_sample
from benchmarks.demo.scans import load_scans
from benchmarks.demo.scenes import CHAT_OBJECTS, draw
from benchmarks.demo.schedule import Clock

CourseName = Literal["blip", "xvlm", "chat"]
COURSES: tuple[CourseName, ...] = (*FAMILIES, "chat")
CHAT_BATCH_SIZE = 64


class Course(Protocol):
    """A new model and how it is trained.

    Attributes:
        model: to be trained.
        peak: highest learning rate.
        decay: weight decay.
        decay_embeddings: whether embeddings decay as matrices do.
    """

    model: Any
    peak: float
    decay: float
    decay_embeddings: bool

    def batches(self, seed: int, clock: Clock, processes: int = 1) -> Iterator[Any]:
        """Endless fresh batches, as hard as progress says: this process's part of each."""

    def losses(self, batch: Any, clock: Clock) -> dict[str, Tensor]:
        """Losses on a batch by name; scalars to be summed."""

    def evaluate(self) -> dict[str, float]:
        """Figures on a validation sample."""

    def save_processors(self, folder: Path) -> None:
        """Write what stands beside the weights."""


class RetrievalCourse:
    """BLIP's or X-VLM's pre-training; see `Course`."""

    peak, decay, decay_embeddings = schedule.PEAK_LEARNING_RATE, 0.05, False

    def __init__(self, family: Family) -> None:
        self.family = family
        self.tokenizer = build_tokenizer(family)
        self.model = build(family, self.tokenizer)
        self._validation = validation_sample()

    def batches(
        self, seed: int, clock: Clock, processes: int = 1
    ) -> Iterator[tuple[Tensor, list[str]]]:
        """Images uint8, and a caption of each."""
        scans = load_scans("pretrain")
        generator = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        while True:
            scenes = draw(
                schedule.batch_size(clock.progress) // processes,
                scans,
                generator,
                single_fraction=schedule.single_fraction(clock.progress),
            )
            yield scenes.images, [captions.write(facts, rng) for facts in scenes.facts()]

    def losses(self, batch: tuple[Tensor, list[str]], clock: Clock) -> dict[str, Tensor]:
        """See `families.training_losses`."""
        matching = schedule.use_matching(clock.step, clock.progress)
        return training_losses(self.family, self.model, self.tokenizer, *batch, matching=matching)

    def evaluate(self) -> dict[str, float]:
        """See `evaluate.evaluate`."""
        return evaluate(self.model, self.tokenizer, self.family, self._validation)

    def save_processors(self, folder: Path) -> None:
        """Tokenizer and image processor."""
        save_processors(self.family, folder)


class ChatBatch(NamedTuple):
    """Images uint8 `[n, 3, 48, 48]`, what they show and what is said about them."""

    images: Tensor
    facts: list[list[Fact]]
    conversations: list[Conversation]


class ChatCourse:
    """First the tower learns to name what is in a cell, then the decoder to describe and answer."""

    peak, decay, decay_embeddings = schedule.CHAT_PEAK_LEARNING_RATE, 0.4, True

    def __init__(self) -> None:
        self.tokenizer = chat.build_tokenizer()
        self.model = chat.build(self.tokenizer)
        self._validation = validation_sample(100, CHAT_OBJECTS)

    def batches(self, seed: int, clock: Clock, processes: int = 1) -> Iterator[ChatBatch]:
        """A caption or a few questions about each scene."""
        scans = load_scans("pretrain")
        generator = torch.Generator().manual_seed(seed)
        rng = np.random.default_rng(seed)
        while True:
            scenes = draw(
                CHAT_BATCH_SIZE // processes,
                scans,
                generator,
                objects=CHAT_OBJECTS,
                single_fraction=schedule.single_fraction(clock.progress),
            )
            share = schedule.caption_share(clock.progress)
            facts = scenes.facts()
            said = [(describe if rng.random() < share else converse)(each, rng) for each in facts]
            yield ChatBatch(scenes.images, facts, said)

    def losses(self, batch: ChatBatch, clock: Clock) -> dict[str, Tensor]:
        """Of naming, then also of the answers, then of these alone; see `chat`."""
        images, facts, said = batch
        seen = chat.look(self.model, images)
        losses = {}
        if schedule.use_naming(clock.progress):
            named = chat.naming_loss(self.model, self.tokenizer, seen, facts)
            losses["naming"] = schedule.NAMING_WEIGHT * named
        if schedule.use_answers(clock.progress):
            losses["answers"] = chat.answer_loss(self.model, self.tokenizer, seen, said)
        return losses

    def evaluate(self) -> dict[str, float]:
        """See `evaluate.evaluate_chat`."""
        return evaluate_chat(self.model, self.tokenizer, self._validation)

    def save_processors(self, folder: Path) -> None:
        """Tokenizer, chat template and image processor, as one processor."""
        chat.build_processor(self.tokenizer).save_pretrained(folder)


def course_of(name: CourseName) -> Course:
    """A new course, weights drawn from torch's global generator."""
    return ChatCourse() if name == "chat" else RetrievalCourse(name)
