"""What a task of `vlp evaluate` is: data that is read once, a model measured as often as asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vlp_plugins.data.batches import Example, ExampleBatches, captioned
from vlp_plugins.data.sources import open_source
from vlp_plugins.job.loaded import Loaded
from vlp_plugins.models.adapter import Batch
from vlp_plugins.runtime.errors import RecipeError


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
