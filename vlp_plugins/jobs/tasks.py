"""The tasks of `vlp evaluate`: data that is read once, a model measured as often as asked."""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from vlp_plugins.data.batches import Example, ExampleBatches, captioned, first
from vlp_plugins.data.labelled import open_labelled
from vlp_plugins.data.questions import open_questions
from vlp_plugins.data.sources import open_source
from vlp_plugins.jobs.inputs import Loaded
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import DataError, RecipeError
from vlp_plugins.tasks.captioning import caption_scores, write_captions
from vlp_plugins.tasks.classification import classification
from vlp_plugins.tasks.retrieval import two_stage_retrieval
from vlp_plugins.tasks.vqa import answer_questions, vqa_accuracy


@dataclass(frozen=True)
class TaskRequest:
    """What is measured, on which data, and how.

    Attributes:
        task: a key of `task_kinds.TASKS`.
        data: the folder, file or id.
        split: None takes the only one, or `train`.
        limit: images (questions) that are measured on, the first ones; None for all.
        batch_size: rows of a batch.
        image_column: of the data; found if None.
        caption_column: of the data; found if None.
        rerank: candidates of retrieval that the matching head orders, whose figures then come with
            those by features; 0: ranked by features alone.
        num_beams: of the beam search of captions and written answers.
        length: most tokens of a written text; None for 30 of captions, 10 of answers.
        answers: file of answers to choose among; None takes those of the data.
        written: the model writes its answers, even if there is a list.
    """

    task: str
    data: str
    split: str | None = None
    limit: int | None = None
    batch_size: int = 32
    image_column: str | None = None
    caption_column: str | None = None
    rerank: int = 0
    num_beams: int = 3
    length: int | None = None
    answers: Path | None = None
    written: bool = False

    def check(self) -> None:
        """Makes sure that everything that is said concerns the task.

        Raises:
            RecipeError: naming the first option that does not.
        """
        for name, option, tasks in _OF_TASKS:
            if self.task not in tasks and getattr(self, name) != _USUAL[name]:
                raise RecipeError(
                    f"--{option} is of {' and '.join(tasks)}, not of {self.task}; leave it out"
                )


_WRITING = ("captioning", "vqa")
_OF_TASKS = (
    ("rerank", "rerank", ("retrieval",)),
    ("num_beams", "beams", _WRITING),
    ("length", "longest", _WRITING),
    ("answers", "answers", ("vqa",)),
    ("written", "written", ("vqa",)),
    ("caption_column", "caption-column", ("retrieval", "captioning")),
)
_USUAL = {one.name: one.default for one in fields(TaskRequest)}


@dataclass(frozen=True)
class Measured:
    """Figures of one model.

    Attributes:
        metrics: numbers by name.
        absent: by metric, why it is not there.
        said: captions or answers, in the order of the examples; empty for other tasks.
    """

    metrics: Mapping[str, float]
    absent: Mapping[str, str] = field(default_factory=dict)
    said: Sequence[str] = ()


Watched = Callable[[Iterable[Batch]], Iterable[Batch]]


class Task(ABC):
    """Data of a task, read for one model and its pruned version."""

    def __init__(self, loaded: Loaded, request: TaskRequest) -> None:
        """Opens the data; images are decoded when they are needed.

        Raises:
            DataError: if it is not there or not of this kind.
        """
        self.loaded, self.request = loaded, request
        self.description = ""
        self.truth: list[tuple[str, list[str]]] = []
        """Of every example, where it is and what people said."""
        examples = self.read()
        self.batches = ExampleBatches(
            examples, loaded.processor, loaded.adapter, request.batch_size
        )

    @abstractmethod
    def read(self) -> list[Example]:
        """The examples; sets `description`, and `truth` if models say something."""

    @abstractmethod
    def measure(self, watched: Watched) -> Measured:
        """Measures the model as it is now.

        Args:
            watched: wraps the batches of the pass, to show how far it is.
        """

    def settings(self) -> dict[str, Any]:
        """What decides the figures beside model and data."""
        return {}

    def captioned(self) -> list[tuple[Any, list[str]]]:
        """The images of the data with all their captions."""
        request = self.request
        source = open_source(
            request.data,
            split=request.split,
            image_column=request.image_column,
            caption_column=request.caption_column,
            captions="all",
        )
        self.description = source.description
        return captioned(source, request.limit)


_log = logging.getLogger(__name__)


class RetrievalTask(Task):
    """Every image with every of its captions."""

    def read(self) -> list[Example]:
        self._images: list[int] = []
        examples = []
        for number, (record, captions) in enumerate(self.captioned()):
            examples += [Example(record.place, record.image, text) for text in captions]
            self._images += [number] * len(captions)
        return examples

    def measure(self, watched: Watched) -> Measured:
        found = two_stage_retrieval(
            self.loaded.model, self.loaded.adapter, watched(self.batches),
            rerank=self.request.rerank or None, image_ids=self._images,
        )  # fmt: skip
        return Measured(found.as_dict())

    def settings(self) -> dict[str, Any]:
        return {
            "rerank": self.request.rerank,
            "images": self._images[-1] + 1,
            "texts": len(self._images),
        }


class CaptioningTask(Task):
    """Every image once; its captions are the references."""

    def read(self) -> list[Example]:
        found = self.captioned()
        self.truth = [(record.place, captions) for record, captions in found]
        return [Example(record.place, record.image, captions[0]) for record, captions in found]

    def measure(self, watched: Watched) -> Measured:
        said = write_captions(
            self.loaded.model, self.loaded.adapter, watched(self.batches), self.loaded.processor,
            max_length=self._length, num_beams=self.request.num_beams,
        )  # fmt: skip
        found = caption_scores(said, [captions for _, captions in self.truth])
        self._words = found.words
        return Measured(found.scores, found.absent, said)

    @property
    def _length(self) -> int:
        return self.request.length or 30

    def settings(self) -> dict[str, Any]:
        return {
            "images": len(self.truth),
            "beams": self.request.num_beams,
            "longest": self._length,
            "words": self._words,
        }


class VqaTask(Task):
    """Every question once."""

    def read(self) -> list[Example]:
        found = open_questions(self.request.data, self.request.split)
        self.description = found.description
        questions = list(first(found.items, self.request.limit, found.description))
        unanswered = next((item.place for item in questions if not item.answers), None)
        if unanswered is not None:
            raise DataError(
                f"{found.description}: {unanswered} has no answers to compare with (those of test "
                "sets are not published); measure another --split"
            )
        self.truth = [(item.place, list(item.answers)) for item in questions]
        self._answers = None if self.request.written else found.answer_list
        if self.request.answers is not None:
            self._answers = read_answers(self.request.answers)
        return [Example(item.place, item.image, item.text) for item in questions]

    def measure(self, watched: Watched) -> Measured:
        said = answer_questions(
            self.loaded.model, self.loaded.adapter, watched(self.batches), self.loaded.processor,
            answers=self._answers, max_length=self._length, num_beams=self.request.num_beams,
        )  # fmt: skip
        found = vqa_accuracy(said, [answers for _, answers in self.truth])
        return Measured({"accuracy": found.accuracy}, said=said)

    @property
    def _length(self) -> int:
        return self.request.length or 10

    def settings(self) -> dict[str, Any]:
        how: dict[str, Any] = {"questions": len(self.truth)}
        if self._answers is not None:
            return how | {"answers to choose among": len(self._answers)}
        return how | {"beams": self.request.num_beams, "longest": self._length}


class ClassificationTask(Task):
    """Every image with its class; where model and data name theirs, names decide."""

    def read(self) -> list[Example]:
        found = open_labelled(self.request.data, self.request.split)
        self.description = found.description
        items = list(first(found.items, self.request.limit, found.description))
        self._images = len(items)
        numbers = class_numbers(self.loaded.model, found.classes)
        labels = [numbers.get(item.label, item.label) for item in items]
        return [
            Example(item.place, item.image, label=label)
            for item, label in zip(items, labels, strict=True)
        ]

    def measure(self, watched: Watched) -> Measured:
        found = classification(self.loaded.model, self.loaded.adapter, watched(self.batches))
        return Measured({f"top{k}": value for k, value in found.top.items()})

    def settings(self) -> dict[str, Any]:
        return {"images": self._images}


TASKS: dict[str, type[Task]] = {
    "retrieval": RetrievalTask,
    "captioning": CaptioningTask,
    "vqa": VqaTask,
    "classification": ClassificationTask,
}


def class_numbers(model: nn.Module, classes: Sequence[str]) -> dict[int, int]:
    """Number of a class in the data -> its number in the model, by their names.

    A split in which a class has no image numbers those after it otherwise than the model does.

    Args:
        model: whose configuration may name its classes.
        classes: of the data, by number; empty if they have no names.

    Returns:
        Empty if names do not tell: the numbers are the same then.
    """
    told: Mapping[int, str] = getattr(getattr(model, "config", None), "id2label", None) or {}
    own = {str(name): int(number) for number, name in told.items()}
    unnamed = all(name == f"LABEL_{number}" for name, number in own.items())
    if unnamed or not classes:
        return {}
    strange = [name for name in classes if name not in own]
    if strange:
        _log.warning(
            "%d of %d classes of the data are none of the model's (first: %r; the model has %r, "
            "...), so classes are compared by number",
            len(strange), len(classes), strange[0], next(iter(own)),
        )  # fmt: skip
        return {}
    return {number: own[name] for number, name in enumerate(classes)}


def read_answers(path: Path) -> tuple[str, ...]:
    """Answers to choose among: a JSON list, or one a line.

    Raises:
        DataError: if the file cannot be read or holds none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the answers in {path}: {error}") from error
    found: Any
    try:
        found = json.loads(text)
    except ValueError:
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not isinstance(found, list) or not found or not all(isinstance(a, str) for a in found):
        raise DataError(f"{path} should hold answers, as a JSON list of texts or one a line")
    return tuple(found)
