"""The data of a task, read once: lists and annotations; no image is decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vlp_plugins.data.batches import captioned, first
from vlp_plugins.data.conversations import Asked
from vlp_plugins.data.labelled import open_labelled
from vlp_plugins.data.nlvr2 import nlvr2_split, open_nlvr2
from vlp_plugins.data.questions import open_questions
from vlp_plugins.data.records import Sample, Samples, said_of, with_split
from vlp_plugins.data.sources import open_source
from vlp_plugins.runtime.errors import DataError
from vlp_plugins.tasks import LOSS


@dataclass(frozen=True)
class TaskSamples:
    """The data of a task.

    Attributes:
        samples: in stored order; no image is decoded yet.
        classes: names of the classes by number; empty where the data names none.
        answers: that models choose among; None where the data brings no list.
    """

    description: str
    samples: tuple[Sample, ...]
    classes: tuple[str, ...] = ()
    answers: tuple[str, ...] | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, or their numbers as text where they have no names; empty without classes."""
        labels = [s.label for s in self.samples if s.label is not None and s.second is None]
        return self.classes or tuple(map(str, range(max(labels, default=-1) + 1)))


def read_samples(
    task: str,
    data: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    chat: bool = False,
) -> TaskSamples:
    """Reads lists and annotations of the data of a task, one of `vlp_plugins.tasks.MEASURED`.

    See `open_source`, `open_questions`, `open_labelled` and `open_nlvr2`. The first `limit` images
    (questions, statements) are kept; None keeps all. For the loss of a chat model also whole
    conversations and questions with answers are read.

    Raises:
        DataError: if it is not there, empty, or not data of the task.
    """
    if task == "vqa":
        try:
            asked = open_questions(data, split)
        except DataError as error:
            return _rows_with_questions(data, split, limit, image_column, error, chat=chat)
        return _questions(asked, limit)
    if task == "nlvr2":
        return _statements(Path(data).expanduser(), split, limit)
    if task == "classification":
        return _labelled(open_labelled(data, split), limit)
    talks = chat and task == LOSS
    source = open_source(
        data,
        split=split,
        image_column=image_column,
        caption_column=caption_column,
        captions="conversations" if talks else "all",
    )
    if talks:
        records = first(source.records(None), limit, source.description)
        samples = (Sample(each.place, each.image, (said_of(each),)) for each in records)
    else:
        pairs = captioned(source, limit)
        samples = (Sample(record.place, record.image, tuple(texts)) for record, texts in pairs)
    return TaskSamples(source.description, tuple(samples))


def _questions(asked: Samples, limit: int | None) -> TaskSamples:
    questions = tuple(first(asked.items, limit, asked.description))
    unanswered = next((item.place for item in questions if not item.answers), None)
    if unanswered is not None:
        raise DataError(
            f"{asked.description}: {unanswered} has no answers to compare with or learn from "
            "(those of test sets are not published); give another --split"
        )
    return TaskSamples(asked.description, questions, answers=asked.answers)


def _statements(folder: Path, split: str | None, limit: int | None) -> TaskSamples:
    chosen = nlvr2_split(folder, split)
    description = with_split(folder, chosen)
    return TaskSamples(description, tuple(first(open_nlvr2(folder, chosen), limit, description)))


def _labelled(images: Samples, limit: int | None) -> TaskSamples:
    samples = tuple(first(images.items, limit, images.description))
    if not samples:
        raise DataError(f"{images.description} holds no image")
    return TaskSamples(images.description, samples, images.classes)


def _rows_with_questions(
    data: str,
    split: str | None,
    limit: int | None,
    image_column: str | None,
    error: DataError,
    *,
    chat: bool,
) -> TaskSamples:
    """Questions of what `datasets` reads; `error` if it has no such columns."""
    try:
        source = open_source(data, split=split, image_column=image_column, captions="conversations")
        records = list(first(source.records(None), limit, source.description))
        asked = [said_of(each) for each in records]
    except (DataError, ValueError):
        raise error from None
    samples = []
    for record, said in zip(records, asked, strict=True):
        if not isinstance(said, Asked):
            raise error
        image = record.image if chat else partial(_first_image, record.image)
        samples.append(
            Sample(record.place, image, (said.question,), said.answers, choices=said.choices)
        )
    return TaskSamples(source.description, tuple(samples))


def _first_image(opened: Callable[[], Any]) -> Image.Image:
    """The one that models read which take one."""
    found = opened()
    image: Image.Image = found[0] if isinstance(found, list) else found
    return image
